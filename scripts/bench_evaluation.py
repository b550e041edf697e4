"""What the losses of vectors cost beside a plain model's, what shared prefixes save, and what half precision changes.

- `per_vector_over_plain`: the time of one vector's losses over that of the plain model of the space's size, the largest
  vector's, at the same rows a pass; median over vectors and rounds. `per_vector_over_extracted`: over the vector's own
  extracted model, which is smaller. Plain models run in fp32 on a CPU; on a GPU in bf16, compiled as a whole with the
  loss. All are timed in turn, in shuffled order, so that a slow moment of the machine meets all.
- `seconds_together`: of ``vectors``, all of a small space, else random ones, in one call; `seconds_one_by_one`, as a
  search does it; and `prefix_speedup`, the ratio. Of thousands every 81st is timed, in stretches between the others.
- `largest_difference_nats`: between losses of both ways. `fp16_difference_nats` and so on: the largest error of a
  difference between any two of the ``compared`` vectors' losses, against fp32 (without TensorFloat-32), their standard
  deviation, and the speed. A search takes fp16 on a GPU.

With --supernet the weights are trained and the windows text; else both are random. The last line of stdout is JSON.

    python scripts/bench_evaluation.py --csv docs/benchmarks/evaluation.csv      tiny on a CPU, decilm-proxy on a GPU
    python scripts/bench_evaluation.py --supernet runs/train/NAME --text data.path
    python scripts/bench_evaluation.py --rounds 1 --windows 2 --vectors 9 --compared 3    a quick look
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import add_rows, argument_parser
from torch import Tensor

from nas.data import prepare_tokens, validation_windows
from nas.data.corpora import TextCorpus
from nas.model import Decoder, Supernet
from nas.model.supernet import load_supernet
from nas.quality import InheritedLoss, LossMemo, on_tensor_cores, row_losses, window_losses
from nas.run import FinishedRun, origin
from nas.space import Vector, load_space
from nas.training.loop import training_device

DEVICE = training_device()
ON_GPU = DEVICE.type == "cuda"
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
MANY, EVERY, STRETCHES = 1000, 81, 27  # of more vectors than MANY, every so many are timed alone, in equal parts


def main(given: argparse.Namespace) -> None:
    """Times and compares."""
    supernet, windows = prepared(given)
    space, rng = supernet.space, random.Random(0)
    everything = list(itertools.product(*space.choices)) if space.size <= given.vectors else []
    vectors = everything or sorted({tuple(map(rng.choice, space.choices)) for _ in range(given.vectors)})
    with tempfile.TemporaryDirectory() as folder:
        loss = InheritedLoss(supernet, windows, LossMemo(Path(folder) / "losses.jsonl"))
        begin = time.perf_counter()
        one(loss, space.largest)
        results: dict[str, Any] = {"first_seconds": round(time.perf_counter() - begin, 1)}
        if given.rounds:
            results |= beside_plain(loss, given.rounds, rng)
            print(results, file=sys.stderr)
        if vectors:
            results |= together(loss, vectors)
            print(results, file=sys.stderr)
        if given.compared:
            results |= compared(loss, rng.sample(vectors, min(given.compared, len(vectors))))
    results |= {"space": space.name, "weights": given.supernet or "random", "rows": loss.rows}
    results |= {"windows": len(windows), "tokens": windows[:, 1:].numel(), "rounds": given.rounds, **origin()}
    if given.csv:
        add_rows(given.csv, results)
    print(json.dumps(results))


def prepared(given: argparse.Namespace) -> tuple[Supernet, Tensor]:
    """The supernet, and validation windows of the whole context."""
    if given.supernet:
        run = FinishedRun(Path(given.supernet), "train")
        supernet = load_supernet(run, DEVICE)
        tokenizer, vocabulary = str(run.artifact("tokenizer.json")), supernet.space.shape.vocab_size
        data = prepare_tokens(TextCorpus(given.text), tokenizer, vocabulary, Path("runs/cache"))
        return supernet, validation_windows(
            data.validation, given.windows, supernet.space.shape.max_position_embeddings
        )
    space, generator = load_space(given.space), torch.Generator().manual_seed(0)
    supernet = Supernet(space)
    supernet.initialise(generator)
    shape = given.windows, space.shape.max_position_embeddings + 1
    return supernet.to(DEVICE), torch.randint(space.shape.vocab_size, shape, generator=generator)


def one(loss: InheritedLoss, vector: Vector) -> float:
    """The loss of a vector, evaluated anew."""
    loss.memo.clear()
    return loss(vector)


def beside_plain(loss: InheritedLoss, rounds: int, rng: random.Random) -> dict[str, float]:
    """The ratios to plain models."""
    space, tokens = loss.supernet.space, loss.windows[:, 1:].numel()
    plain = plain_losses(loss, loss.supernet.extract(space.largest))
    seconds: dict[str, list[float]] = {"elastic": [], "plain": [], "own": []}
    mixed = [tuple(choices[layer % len(choices)] for layer, choices in enumerate(space.choices))]
    for vector in [*space.uniform_vectors(), *mixed]:
        own = plain_losses(loss, loss.supernet.extract(vector)) if not ON_GPU else None  # each takes a compilation
        contestants: dict[str, Callable[[], Any]] = {"elastic": partial(one, loss, vector), "plain": plain}
        contestants |= {"own": own} if own else {}
        for number in range(rounds + 1):
            for name in rng.sample(sorted(contestants), len(contestants)):
                took, _ = timed(contestants[name])
                if number:  # the first warms up
                    seconds[name].append(took)
    found: dict[str, float] = {}
    for name, key in (("plain", "plain"), ("extracted", "own")):
        if seconds[key]:
            ratios = np.divide(seconds["elastic"], seconds[key])
            found[f"per_vector_over_{name}"] = round(float(np.median(ratios)), 4)
    for prefix, key in (("", "elastic"), ("plain_", "plain")):
        found[f"{prefix}tokens_per_s"] = round(tokens / statistics.median(seconds[key]))
    return found


def plain_losses(loss: InheritedLoss, model: Decoder) -> Callable[[], float]:
    """A function that evaluates a plain model on the same windows, in passes of as many rows."""

    @torch.no_grad()
    def losses(windows: Tensor) -> Tensor:
        return row_losses(model(windows[:, :-1]), windows[:, 1:])

    model.eval()
    run = torch.compile(losses) if ON_GPU else losses
    if ON_GPU:
        model.bfloat16()
    passes = -(-len(loss.windows) // loss.rows)
    pieces = loss.windows.split(-(-len(loss.windows) // passes))
    return lambda: float(torch.cat([run(piece) for piece in pieces]).double().mean())


def together(loss: InheritedLoss, vectors: list[Vector]) -> dict[str, float]:
    """The losses of many vectors in one call, and one by one."""
    every, size = (EVERY, len(vectors) // STRETCHES) if len(vectors) > MANY else (1, len(vectors))
    at_once, one_by_one, difference = 0.0, 0.0, 0.0
    for start in range(0, len(vectors), size):
        stretch = vectors[start : start + size]
        loss.memo.clear()
        took, losses = timed(partial(loss.of, stretch))
        at_once += took
        for index in range(0, len(stretch), every):
            took, alone = timed(partial(one, loss, stretch[index]))
            one_by_one += every * took
            difference = max(difference, abs(losses[index] - alone))
    return {
        "prefix_speedup": round(one_by_one / at_once, 3),
        "largest_difference_nats": difference,
        "vectors": len(vectors),
        "seconds_together": round(at_once, 1),
        "seconds_one_by_one": round(one_by_one, 1),
    }


def compared(loss: InheritedLoss, vectors: list[Vector]) -> dict[str, float]:
    """Errors of differences between vectors against fp32, and the speed, of each precision on tensor cores."""

    def losses(some: list[Vector]) -> list[float]:
        means: list[float] = window_losses(loss.supernet, some, loss.windows, loss.rows).double().mean(1).tolist()
        return means

    found: dict[str, float] = {"compared": len(vectors)}
    exact = np.array(losses(vectors))
    for name, dtype in PRECISIONS.items():
        with on_tensor_cores(DEVICE, dtype):
            errors = losses(vectors) - exact  # compiles
            few = vectors[:10]
            took, _ = timed(partial(losses, few))
        found |= {f"{name}_difference_nats": float(np.ptp(errors)), f"{name}_sd_nats": float(errors.std(ddof=1))}
        found[f"{name}_tokens_per_s"] = round(len(few) * loss.windows[:, 1:].numel() / took)
        print(found, file=sys.stderr)
    return {**found, "range_nats": float(np.ptp(exact))}


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    begin = time.perf_counter()
    result = what()  # a number on the host: it waits for the device
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--space", default="decilm-proxy" if ON_GPU else "tiny")
    parser.add_argument("--supernet", help="a finished train run, in place of random weights of --space")
    parser.add_argument("--text", help="data.path of the windows that a --supernet is evaluated on")
    parser.add_argument("--windows", type=int, default=256 if ON_GPU else 8, help="of the space's whole context")
    parser.add_argument("--rounds", type=int, default=5 if ON_GPU else 15, help="0: no plain models")
    parser.add_argument("--vectors", type=int, default=161 if ON_GPU else 6561, help="all of a space with no more")
    parser.add_argument("--compared", type=int, default=100 if ON_GPU else 9, help="vectors against fp32; 0: none")
    parser.add_argument("--csv", type=Path, help="table to add a line to")
    main(parser.parse_args())
