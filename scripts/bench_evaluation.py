"""What evaluating the vectors of a supernet costs beside a plain model, and what shared prefixes save.

`per_vector_over_plain`: the loss of one vector by the supernet over that of its extracted sub-network, both timed in
turn so that a slow moment of the machine meets both; the median over vectors and rounds. `prefix_speedup`: all 6,561
vectors of tiny one by one over all of them together; one by one is timed on every 81st, in stretches between the
stretches of the whole. The losses of both are compared. The last line of stdout is JSON.

python scripts/bench_evaluation.py [ROUNDS]
"""

import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from nas.hardware import cpu_name
from nas.model import Supernet
from nas.quality import mean_loss, vector_losses
from nas.space import load_space
from nas.training import training_device

DEVICE = training_device()
SPACE = load_space("tiny")
WINDOWS = 8  # of the space's whole context
STRETCHES = 27  # equal parts of all vectors


def main(rounds: int) -> None:
    """Times and compares."""
    generator = torch.Generator().manual_seed(0)
    supernet = Supernet(SPACE)
    supernet.initialise(generator)
    with torch.no_grad():
        for parameter in supernet.parameters():  # far enough from the start that vectors differ clearly
            parameter.mul_(3.0)
    supernet = supernet.to(DEVICE).eval()
    windows = torch.randint(SPACE.shape.vocab_size, (WINDOWS, 257), generator=generator).to(DEVICE)

    ratios = []
    for vector in [*SPACE.uniform_vectors(), (4, 2, 1, 4, 2, 1, 4, 2), (1, 1, 1, 1, 4, 4, 4, 4)]:
        plain = supernet.extract(vector)
        for number in range(rounds + 1):
            elastic, _ = timed(lambda vector=vector: vector_losses(supernet, [vector], windows))  # type: ignore[misc]
            alone, _ = timed(lambda plain=plain: mean_loss(plain, windows))  # type: ignore[misc]
            if number:  # the first warms up
                ratios.append(elastic / alone)

    everything = list(itertools.product(*SPACE.choices))
    together, one_by_one, difference = 0.0, 0.0, 0.0
    size = len(everything) // STRETCHES
    for start in range(0, len(everything), size):
        stretch = everything[start : start + size]
        seconds, losses = timed(lambda stretch=stretch: vector_losses(supernet, stretch, windows))  # type: ignore[misc]
        together += seconds
        for index in range(0, size, 81):
            seconds, alone = timed(lambda vector=stretch[index]: vector_losses(supernet, [vector], windows))  # type: ignore[misc]
            one_by_one += 81 * seconds
            difference = max(difference, abs(losses[index] - alone[0]))
    facts = {
        "per_vector_over_plain": round(statistics.median(ratios), 4),
        "prefix_speedup": round(one_by_one / together, 3),
        "largest_difference_nats": difference,
        "vectors": len(everything),
        "seconds_together": round(together, 1),
        "space": SPACE.name,
        "windows": WINDOWS,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(facts))


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    begin = time.perf_counter()
    result = what()  # a number on the host: it waits for the device
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
