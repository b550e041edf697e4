"""Is the largest batch that we predict the largest that fits? Tried out on a GPU, for vectors, contexts and caps.

Each trial reads a chunk of prompts and decodes a step under a cap on PyTorch's memory. The predicted batch must do so,
and then larger ones are tried until one does not. Writes docs/memory/batch_max.csv.

    python scripts/memory_check.py
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from served_trial import fits, memory_cap

from nas.files import write_atomically
from nas.hardware import nvml_facts
from nas.latency.memory import MemoryModel
from nas.latency.predictor import Workload
from nas.run import origin
from nas.shape import ModelShape
from nas.space import Vector, format_vector, load_space

OUT = Path("docs/memory/batch_max.csv")
CONTEXTS, CAPS_GIB, PROMPT, RUNTIME = (1024, 2048, 4096), (22.5, 40.0), 1024, "graph"


def vectors() -> dict[str, tuple[ModelShape, Vector]]:
    """Six vectors by name."""
    llama, decilm = load_space("llama-2-7b"), load_space("decilm-6b")
    mixed = tuple(int(groups) for groups in np.random.default_rng(0).choice([1, 2, 4], 32))
    named = {"DeciLM-6B": decilm.known_vectors["DeciLM-6B"], "mixed": mixed}
    named |= {f"uniform {vector[0]}": vector for vector in decilm.uniform_vectors()}
    shaped = {name: (decilm.shape, vector) for name, vector in named.items()}
    return shaped | {"Llama-2-7B": (llama.shape, llama.largest)}


def largest(shape: ModelShape, vector: Vector, context: int, predicted: int) -> int:
    """The largest batch that fits: up from the prediction in steps, then by bisection."""

    def fit(batch: int) -> bool:
        return fits(shape, vector, Workload(batch, context, PROMPT, "bf16", RUNTIME))

    good, bad, step = 0, max(1, predicted), max(2, predicted // 20)
    while fit(bad):
        good, bad = bad, bad + step
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fit(middle) else (good, middle)
    return good


def main() -> None:
    driver = nvml_facts(str(torch.cuda.get_device_properties(0).uuid)).get("driver")
    machine = {"driver": driver} | origin()
    rows: list[dict[str, Any]] = []
    for cap, context, (name, (shape, vector)) in itertools.product(CAPS_GIB, CONTEXTS, vectors().items()):
        with memory_cap(cap):
            model = MemoryModel(shape, Workload(1, context, PROMPT, "bf16", RUNTIME), on_gpu=True)
            predicted = model.largest_batch(vector, cap * 2**30)
            real = largest(shape, vector, context, predicted)
        row = {"name": name, "vector": format_vector(vector), "context": context, "memory_gib": cap}
        row |= {"predicted": predicted, "largest": real, "fits": predicted <= real}
        rows.append(row | {"left_unused": 1 - predicted / real if real else 0.0} | machine)
        print(name, context, cap, predicted, real, flush=True)
        write_atomically(OUT, partial(pd.DataFrame(rows).to_csv, index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    main()
