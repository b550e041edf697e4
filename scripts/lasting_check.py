"""Decode steps that follow one another for seconds, as a busy server runs them, against the tables that ship.

A table is made of short runs. A card that reaches its power limit is slower after a second, more so for some vectors
than for others, and another card of the same name is another card. So steps are timed here for two seconds each, the
choice of the next tokens included, in a session of its own: uniform vectors, DeciLM-6B's, and random ones, half of them
from mixtures that front vectors have (mostly one number of groups); at batches and contexts on and off the grid.

    python scripts/lasting_check.py --measure   on a GPU: adds its rows to docs/latency/lasting.csv
    python scripts/lasting_check.py             the errors of the shipped tables: lasting_errors.csv
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from shared import add_rows, argument_parser, gpu_origin, gpu_uuid, markdown_table, shipped_folder

from nas.files import write_csv
from nas.latency.accuracy import random_vectors
from nas.latency.measurement import step_and_choice
from nas.latency.pool import LayerPool
from nas.latency.predictor import Point
from nas.latency.table import TableLatency
from nas.run import now
from nas.space import SearchSpace, Vector, format_vector, load_space, parse_vector

OUT = Path("docs/latency")
SPACE, RUNTIME = "decilm-6b", "compiled"
# Batch and context: below 64, between 65 and 127, and beyond; on the shipped grid and between its points.
STEPS = [(1, 2048), (16, 3000), (48, 2048), (80, 1500), (112, 2048), (192, 2048), (208, 3000), (320, 1024)]
PROMPTS = [(5, 768), (2, 2000)]  # prompts and their tokens
RANDOM, MIXED, SEED = 4, 4, 17
WARM_UP_S, LASTS_S = 0.7, 2.0


def vectors(space: SearchSpace) -> dict[Vector, str]:
    """The kind of each vector that is timed."""
    kinds = {vector: "uniform" for vector in space.uniform_vectors()}
    kinds |= {vector: name for name, vector in space.known_vectors.items()}
    kinds |= {vector: "random" for vector in random_vectors(space, RANDOM, SEED)}
    rng, choices = np.random.default_rng(SEED), sorted(set().union(*space.choices))
    for _ in range(MIXED):
        mixture = rng.dirichlet(np.full(len(choices), 0.5))
        kinds[tuple(int(groups) for groups in rng.choice(choices, space.shape.num_hidden_layers, p=mixture))] = "mixed"
    return kinds


def lasting_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call when one follows the other for `LASTS_S`, after a warm-up."""
    for seconds in (WARM_UP_S, LASTS_S):
        torch.cuda.synchronize()
        begun, calls = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            for _ in range(4):
                call()
            calls += 4
            if calls % 32 == 0:  # the host does not run ahead by more than this
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - begun) / calls
    return ms


def measure(file: Path) -> None:
    """Adds a session's rows to the file, each as it comes."""
    space = load_space(SPACE)
    kinds = vectors(space)
    points = [Point("decode", "whole", vector, *at) for at in STEPS for vector in kinds]
    points += [Point("prefill", "whole", vector, *at) for at in PROMPTS for vector in space.uniform_vectors()]
    np.random.default_rng(SEED).shuffle(points)
    points.sort(key=lambda point: (point.phase, point.batch, point.length))  # shuffled within a workload
    memory_bytes = int(0.85 * torch.cuda.mem_get_info()[0])
    pool = LayerPool(space, "bf16", RUNTIME, torch.device("cuda"), points, memory_bytes)
    session = {"card": gpu_uuid().partition("-")[0]} | gpu_origin() | {"date": now()}
    for point in points:
        with torch.inference_mode():
            call, _ = pool.prepare(point)
            ms = lasting_ms(partial(step_and_choice, call) if point.phase == "decode" else call)
        row: dict[str, Any] = {"phase": point.phase, "kind": kinds[point.groups], "vector": format_vector(point.groups)}
        row |= {"batch": point.batch, "length": point.length, "measured_ms": ms}
        print(*row.values(), flush=True)
        add_rows(file, row | session)


def beside_predictions(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds what the shipped tables predict: of lasting steps, and of short runs."""
    tables = {device: TableLatency(shipped_folder(device, SPACE, RUNTIME)) for device in rows["device"].unique()}
    found = []
    for row in rows.to_dict("records"):
        table, at = tables[row["device"]], (parse_vector(row["vector"]), row["batch"], row["length"])
        short_ms = table.forward_ms(row["phase"], *at)
        lasting_ms = table.decode_ms(*at) if row["phase"] == "decode" else short_ms
        found.append(row | {"short_ms": short_ms, "predicted_ms": lasting_ms})
    return pd.DataFrame(found)


def errors(rows: pd.DataFrame) -> pd.DataFrame:
    """By session and workload: mean and worst error, of short runs' predictions too, Kendall's τ, uniform vectors'."""
    found, keys = [], ["date", "device", "phase", "batch", "length"]
    for at, own in rows.groupby(keys):
        error, short = ((own[key] / own["measured_ms"] - 1).abs() for key in ("predicted_ms", "short_ms"))
        found.append(dict(zip(keys, at, strict=True)))
        found[-1] |= {"vectors": len(own), "mean": error.mean(), "worst": error.max(), "short_mean": short.mean()}
        found[-1] |= {"uniform_worst": error[own["kind"] == "uniform"].max()}
        found[-1] |= {"tau": kendalltau(own["predicted_ms"], own["measured_ms"]).statistic if len(own) > 3 else None}
    return pd.DataFrame(found)


def markdown(found: pd.DataFrame) -> str:
    """docs/latency.md's table: the workloads at which many vectors were timed, with a column for each session."""
    steps = found[found["tau"].notna() & (found["phase"] == "decode")]
    shown = [
        f"{row['mean']:.2%} ({row['short_mean']:.2%}), {row['worst']:.2%}, {row['tau']:.3f}"
        for row in steps.to_dict("records")
    ]
    sessions = steps["device"].str.split().str[1] + ", " + steps["date"].str[11:16]
    table = steps.assign(cell=shown, session=sessions).pivot(
        index=["batch", "length"], columns="session", values="cell"
    )
    rows = [
        [f"{batch}, {length}", *cells] for (batch, length), cells in zip(table.index, table.to_numpy(), strict=True)
    ]
    return markdown_table(["batch, context", *table.columns], rows, "l" + "r" * table.shape[1])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="time steps on this GPU; default: the errors")
    if parser.parse_args().measure:
        measure(OUT / "lasting.csv")
        return
    found = errors(beside_predictions(pd.read_csv(OUT / "lasting.csv")))
    write_csv(OUT / "lasting_errors.csv", found)
    print(found.round(4).to_string(index=False), markdown(found), sep="\n\n")


if __name__ == "__main__":
    main()
