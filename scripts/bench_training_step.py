"""What a supernet's training step costs beside a plain step of the plain model of the same size.

Steps are interleaved, so that a slow moment of the machine meets all kinds alike; the figures are ratios of medians.
On a CPU the space is tiny, in fp32; on a GPU it is small, compiled, in bf16. The last line of stdout is JSON.

    python scripts/bench_training_step.py --rounds 40 --csv docs/benchmarks/training_step.csv
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import add_rows, argument_parser
from torch import nn

from nas.config import SupernetConfig, TrainConfig
from nas.model import Decoder, Supernet
from nas.run import origin
from nas.space import load_space
from nas.training.loop import Loss, make_optimizer, make_ready, training_device, training_step
from nas.training.recipes import supernet_loss, text_loss

ON_GPU = training_device().type == "cuda"
SPACE = load_space("small" if ON_GPU else "tiny")
ROWS = 32 if ON_GPU else 8
WARM_UP = 5


def main(rounds: int, table: Path | None) -> None:
    """Times the steps and prints the ratios."""
    torch.manual_seed(0)
    length = SPACE.shape.max_position_embeddings
    tokens = np.random.default_rng(0).integers(0, SPACE.shape.vocab_size, 1_000_000).astype(np.uint32)

    def plain() -> Callable[[int], None]:
        options = TrainConfig(batch=ROWS, compile=ON_GPU)
        model = Decoder(SPACE.shape, SPACE.largest)
        model.initialise(torch.Generator().manual_seed(0))
        return stepper(model, text_loss(tokens, options, length), options)

    def supernet(sharing: str, recipe: str = "mixed") -> Callable[[int], None]:
        options = SupernetConfig(batch=ROWS, compile=ON_GPU, sharing=sharing, recipe=recipe)
        model = Supernet(SPACE, sharing)
        model.initialise(torch.Generator().manual_seed(0))
        return stepper(model, supernet_loss(SPACE, tokens, options, length), options)

    def stepper(model: nn.Module, loss_at: Loss, options: TrainConfig) -> Callable[[int], None]:
        ready = make_ready(model, options)
        optimizer = make_optimizer(model, options)

        def step(number: int) -> None:
            training_step(ready, loss_at, number, optimizer, options)
            if ON_GPU:
                torch.cuda.synchronize()

        return step

    kinds = {"plain": plain(), "mixed": supernet("sliced"), "sandwich": supernet("sliced", "sandwich")}
    kinds |= {rule: supernet(rule) for rule in ("pooled", "separate")}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + WARM_UP):
        for kind, step in kinds.items():
            begin = time.perf_counter()
            step(number)
            if number >= WARM_UP:
                seconds[kind].append(time.perf_counter() - begin)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    for kind, median in medians.items():
        print(f"{kind:10s} {1e3 * median:8.2f} ms  {median / medians['plain']:.3f} × plain")
    plain_s = medians.pop("plain")
    results: dict[str, Any] = {f"{kind}_over_plain": round(median / plain_s, 4) for kind, median in medians.items()}
    results |= {"space": SPACE.name, "rows": ROWS, "rounds": rounds, **origin()}
    if table:
        add_rows(table, results)
    print(json.dumps(results))


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--csv", type=Path, help="table to add a line to")
    given = parser.parse_args()
    main(given.rounds, given.csv)
