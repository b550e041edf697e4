"""Is the largest batch that we predict the largest that fits? Tried out on a GPU, for vectors, contexts and caps.

Each trial reads a chunk of prompts and decodes a step under a cap on PyTorch's memory. The predicted batch must do so,
and then larger ones are tried until one does not. Adds its rows to docs/memory/batch_max.csv.

    python scripts/memory_check.py
    python scripts/memory_check.py --runtime compiled --contexts 512 3000 --caps-gib 16 40 --random 2
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from headline import PROMPT, models
from served_trial import fits, memory_cap
from shared import add_rows, argument_parser, gpu_origin

from nas.latency.accuracy import random_vectors
from nas.latency.memory import MemoryModel
from nas.latency.predictor import STEP_REVISION, Workload
from nas.shape import ModelShape
from nas.space import Vector, format_vector, load_space

OUT = Path("docs/memory/batch_max.csv")
CONTEXTS, CAPS_GIB = (1024, 2048, 4096), (22.5, 40.0)


def vectors(random: int) -> dict[str, tuple[ModelShape, Vector]]:
    """Those of the headline and a mixed vector by name, or so many random ones."""
    decilm = load_space("decilm-6b")
    if random:
        drawn = random_vectors(decilm, random, seed=7)
        return {f"random {n}": (decilm.shape, vector) for n, vector in enumerate(drawn)}
    mixed = tuple(int(groups) for groups in np.random.default_rng(0).choice([1, 2, 4], 32))
    return models() | {"mixed": (decilm.shape, mixed)}


def largest(shape: ModelShape, vector: Vector, workload: Workload, predicted: int) -> int:
    """The largest batch that fits: up from the prediction in steps, then by bisection."""

    def fit(batch: int) -> bool:
        return fits(shape, vector, replace(workload, batch=batch))

    good, bad, step = 0, max(1, predicted), max(2, predicted // 20)
    while fit(bad):
        good, bad = bad, bad + step
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fit(middle) else (good, middle)
    return good


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runtime", choices=list(STEP_REVISION), default="graph")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--caps-gib", type=float, nargs="+", default=CAPS_GIB)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many random vectors instead of the six")
    options = parser.parse_args()
    machine = gpu_origin()
    trials = itertools.product(options.caps_gib, options.contexts, vectors(options.random).items())
    for cap, context, (name, (shape, vector)) in trials:
        workload = Workload(1, context, min(PROMPT, context), "bf16", options.runtime)
        predicted = MemoryModel(shape, workload, on_gpu=True).largest_batch(vector, cap * 2**30)
        with memory_cap(cap):
            real = largest(shape, vector, workload, predicted)
        row: dict[str, Any] = {"name": name, "vector": format_vector(vector), "runtime": options.runtime}
        row |= {"context": context, "memory_gib": cap, "predicted": predicted, "largest": real}
        row |= {"fits": predicted <= real, "left_unused": 1 - predicted / real if real else 0.0}
        add_rows(OUT, row | machine)
        print(options.runtime, name, context, cap, predicted, real, flush=True)


if __name__ == "__main__":
    main()
