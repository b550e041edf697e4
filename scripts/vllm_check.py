"""What we predict beside what vLLM does: decode throughput of vectors at the largest batch that each of the two holds.

vLLM serves the configuration that `nas export` writes, with random weights, under a cap on memory. It needs a Python of
its own with vllm installed (0.22 was tried), for its requirements are not ours.

    python scripts/vllm_check.py --serve PYTHON   on a GPU, by vLLM's Python: adds what docs/vllm/served.csv lacks
    python scripts/vllm_check.py                  beside the shipped tables of that card: docs/vllm/check.csv
"""

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from headline import CONTEXT, MEMORY_GIB, models, shipped_table, workload
from scipy.stats import kendalltau
from shared import add_rows, argument_parser, gpu_origin

from nas.errors import UserError
from nas.export.hf import copy_code, hf_config
from nas.files import write_csv, write_json
from nas.latency.memory import MemoryModel
from nas.shape import ModelShape
from nas.space import Vector, format_vector, load_space, parse_vector

OUT = Path("docs/vllm")
RUNTIME, RANDOM, SEED = "compiled", 10, 5


def all_models() -> dict[str, tuple[ModelShape, Vector]]:
    """Those of the headline, and random vectors from mixtures, as a front has them."""
    space, rng = load_space("decilm-6b"), np.random.default_rng(SEED)
    choices, layers = sorted(set().union(*space.choices)), space.shape.num_hidden_layers
    drawn = [rng.choice(choices, layers, p=rng.dirichlet(np.ones(len(choices)))) for _ in range(RANDOM)]
    random = {f"random {n}": (space.shape, tuple(map(int, vector))) for n, vector in enumerate(drawn)}
    return models() | random


def largest_batch(shape: ModelShape, vector: Vector) -> int:
    return MemoryModel(shape, workload(1, RUNTIME), on_gpu=True).largest_batch(vector, MEMORY_GIB * 2**30)


def write_configuration(shape: ModelShape, vector: Vector, folder: Path) -> None:
    """A model directory without weights; plain Llama where every head has keys and values of its own."""
    config = hf_config(shape, vector)
    if set(vector) == {shape.num_attention_heads}:
        config = {key: value for key, value in config.items() if key not in ("auto_map", "block_configs")}
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    copy_code(folder)
    config |= {"bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", config)


def serve(python: str, file: Path) -> None:
    """Runs vLLM once for each model that the file lacks of this card, and adds what it did."""
    about = {"memory_gib": MEMORY_GIB} | gpu_origin()
    served = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["device", "model"])
    done = set(served.loc[served["device"] == about["device"], "model"])
    for name, (shape, vector) in all_models().items():
        if name in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_configuration(shape, vector, Path(folder))
            most = -(-largest_batch(shape, vector) // 8) * 8 + 8
            words = [python, Path(__file__).with_name("vllm_decode.py"), folder, MEMORY_GIB, CONTEXT, most]
            run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
        if run.returncode:
            print(name, "failed:", run.stdout[-500:], run.stderr[-3000:], flush=True)
            continue
        found = json.loads(run.stdout.strip().splitlines()[-1])
        row = {"model": name, "vector": format_vector(vector), **found, **about}
        print(row, flush=True)
        add_rows(file, row)


def beside_predictions(served: pd.DataFrame) -> pd.DataFrame:
    """Adds vLLM's throughput, our largest batch and throughput there, and our step at vLLM's batch and context.

    What the shipped table of the card does not cover stays empty.
    """
    shapes, rows = all_models(), []
    for row in served.to_dict("records"):
        shape, vector = shapes[row["model"]]
        assert parse_vector(row["vector"]) == vector
        table = shipped_table(row["device"], row["model"], RUNTIME)
        row["vllm_tokens_per_s"] = 1e3 * row["batch"] / row["vllm_ms"]
        row["our_batch"] = largest_batch(shape, vector)
        with suppress(UserError):
            row["our_tokens_per_s"] = 1e3 * row["our_batch"] / table.decode_ms(vector, row["our_batch"], CONTEXT)
        with suppress(UserError):
            row["our_ms_at_its_batch"] = table.decode_ms(vector, row["batch"], row["context"])
            row["vllm_over_ours"] = row["vllm_ms"] / row["our_ms_at_its_batch"]
        rows.append(row)
    return pd.DataFrame(rows)


def rankings(rows: pd.DataFrame) -> pd.DataFrame:
    """Kendall's τ of predictions with what vLLM did, by card: of throughput, each at its own largest batch, and steps.

    Without Llama-2-7B, whose shape is another; ``total`` is what the mere number of groups, over all layers, knows of
    the throughput, and ``with_llama`` τ of all models.
    """
    found = []
    for device, every in rows.dropna(subset="our_tokens_per_s").groupby("device"):
        own = every[every["model"] != "Llama-2-7B"]
        if len(own) > 2:
            throughput, totals = own["vllm_tokens_per_s"], own["vector"].map(lambda vector: -sum(parse_vector(vector)))
            found.append({"device": device, "vectors": len(own)})
            for name, one, other in (
                ("throughput", own["our_tokens_per_s"], throughput),
                ("total", totals, throughput),
                ("step", own["our_ms_at_its_batch"], own["vllm_ms"]),
                ("with_llama", every["our_tokens_per_s"], every["vllm_tokens_per_s"]),
            ):
                found[-1][name] = float(kendalltau(one, other).statistic)
    return pd.DataFrame(found)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--serve", metavar="PYTHON", help="run what served.csv lacks, by vLLM's Python")
    if python := parser.parse_args().serve:
        serve(python, OUT / "served.csv")
        return
    rows = beside_predictions(pd.read_csv(OUT / "served.csv"))
    write_csv(OUT / "check.csv", rows)
    ours = ["our_batch", "our_tokens_per_s", "vllm_over_ours"]
    columns = ["device", "model", "batch", "vllm_ms", "vllm_tokens_per_s", *ours]
    print(rows[columns].round(3).to_string(index=False))
    print("Kendall's τ:", rankings(rows).round(3).to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()
