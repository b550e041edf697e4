"""What evaluating the vectors of a supernet costs beside a plain model, and what shared prefixes save.

`per_vector_over_plain`: the loss of one vector by the supernet over that of the plain model of the space's size, the
largest vector's; the median over vectors and rounds. `per_vector_over_extracted`: the same over the vector's own
extracted model, which is smaller. All are timed in turn, in shuffled order, so that a slow moment of the machine meets
all. `prefix_speedup`: all 6,561 vectors of tiny one by one over all of them together; one by one is timed on every
81st, in stretches between the stretches of the whole. The losses of both are compared. The last line of stdout is JSON.

    python scripts/bench_evaluation.py --rounds 15 --csv docs/benchmarks/evaluation.csv
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nas.model import Supernet
from nas.quality import mean_loss, vector_losses
from nas.run import origin
from nas.space import load_space
from nas.training.loop import training_device

DEVICE = training_device()
SPACE = load_space("tiny")
WINDOWS = 8  # of the space's whole context
STRETCHES = 27  # equal parts of all vectors


def main(rounds: int, table: Path | None) -> None:
    """Times and compares."""
    generator = torch.Generator().manual_seed(0)
    supernet = Supernet(SPACE)
    supernet.initialise(generator)
    with torch.no_grad():
        for parameter in supernet.parameters():  # far enough from the start that vectors differ clearly
            parameter.mul_(3.0)
    supernet = supernet.to(DEVICE).eval()
    windows = torch.randint(SPACE.shape.vocab_size, (WINDOWS, 257), generator=generator).to(DEVICE)

    plain, rng = supernet.extract(SPACE.largest).eval(), random.Random(0)
    over_plain, over_extracted = [], []
    for vector in [*SPACE.uniform_vectors(), (4, 2, 1, 4, 2, 1, 4, 2), (1, 1, 1, 1, 4, 4, 4, 4)]:
        own = supernet.extract(vector).eval()
        contestants: dict[str, Callable[[], Any]] = {
            "elastic": lambda vector=vector: vector_losses(supernet, [vector], windows),  # type: ignore[misc]
            "plain": lambda: mean_loss(plain, windows),
            "own": lambda own=own: mean_loss(own, windows),  # type: ignore[misc]
        }
        for number in range(rounds + 1):
            order = rng.sample(sorted(contestants), len(contestants))
            seconds = {name: timed(contestants[name])[0] for name in order}
            if number:  # the first warms up
                over_plain.append(seconds["elastic"] / seconds["plain"])
                over_extracted.append(seconds["elastic"] / seconds["own"])

    everything = list(itertools.product(*SPACE.choices))
    together, one_by_one, difference = 0.0, 0.0, 0.0
    size = len(everything) // STRETCHES
    for start in range(0, len(everything), size):
        stretch = everything[start : start + size]
        took, losses = timed(lambda stretch=stretch: vector_losses(supernet, stretch, windows))  # type: ignore[misc]
        together += took
        for index in range(0, size, 81):
            took, alone = timed(lambda vector=stretch[index]: vector_losses(supernet, [vector], windows))  # type: ignore[misc]
            one_by_one += 81 * took
            difference = max(difference, abs(losses[index] - alone[0]))
    results = {
        "per_vector_over_plain": round(statistics.median(over_plain), 4),
        "per_vector_over_extracted": round(statistics.median(over_extracted), 4),
        "prefix_speedup": round(one_by_one / together, 3),
        "largest_difference_nats": difference,
        "vectors": len(everything),
        "seconds_together": round(together, 1),
        "space": SPACE.name,
        "windows": WINDOWS,
        "rounds": rounds,
        **origin(),
    }
    if table:
        pd.DataFrame([results]).to_csv(table, mode="a", header=not table.is_file(), index=False)
    print(json.dumps(results))


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    begin = time.perf_counter()
    result = what()  # a number on the host: it waits for the device
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="table to add a line to")
    given = parser.parse_args()
    main(given.rounds, given.csv)
