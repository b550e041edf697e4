"""Decode steps that follow one another for seconds, as a busy server runs them, against the tables that ship.

A table is made of short runs. A card that reaches its power limit is slower after a second, more so for some vectors
than for others, and another card of the same name is another card. So steps are timed here for two seconds each, the
choice of the next tokens included, in a session of its own: uniform vectors, DeciLM-6B's, and random ones, half of them
from mixtures that front vectors have (mostly one number of groups); at batches and contexts on and off the grid.

    python scripts/lasting_check.py measure [192x2048 …]    on a GPU: adds its rows to docs/latency/lasting.csv
    python scripts/lasting_check.py calibrate               on a GPU: energy.csv of the shipped table again
    python scripts/lasting_check.py                         the errors of the shipped tables: lasting_errors.csv
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau

from nas import shipped
from nas.files import read_json, write_atomically, write_csv, write_json
from nas.hardware import nvml_facts
from nas.latency.accuracy import lasting_load, random_vectors
from nas.latency.energy import ENERGY, ENERGY_COLUMNS, measure_energy
from nas.latency.measurement import step_and_choice
from nas.latency.pool import LayerPool
from nas.latency.predictor import Point
from nas.latency.table import META, TABLE, TableLatency
from nas.run import now, origin
from nas.space import SearchSpace, Vector, format_vector, load_space, parse_vector

OUT = Path("docs/latency")
SPACE, RUNTIME = "decilm-6b", "compiled"
# Batch and context: below 64, between 65 and 127, and beyond; on the shipped grid and between its points.
STEPS = [(1, 2048), (16, 3000), (48, 2048), (80, 1500), (112, 2048), (192, 2048), (208, 3000), (320, 1024)]
PROMPTS = [(5, 768), (2, 2000)]  # prompts and their tokens
POWER_BATCHES, POWER_CONTEXT, POWER_S = [1, 8, 32, 64, 80, 112, 128, 192, 256, 320], 2048, 5.0
RANDOM, MIXED, SEED = 4, 4, 17
WARM_UP_S, LASTS_S = 0.7, 2.0
MEMORY_SHARE = 0.85


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


def machine() -> dict[str, Any]:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return {"card": uuid.partition("-")[0], "driver": nvml_facts(uuid).get("driver")} | origin() | {"date": now()}


def pool_for(space: SearchSpace, points: list[Point]) -> LayerPool:
    memory_bytes = int(MEMORY_SHARE * torch.cuda.mem_get_info()[0])
    return LayerPool(space, "bf16", RUNTIME, torch.device("cuda"), points, memory_bytes)


def measure(file: Path, steps: list[tuple[int, int]]) -> None:
    """Adds a session's rows to the file, each as it comes: all of `STEPS` and `PROMPTS`, or the ``steps`` given."""
    space = load_space(SPACE)
    kinds = vectors(space)
    points = [Point("decode", "whole", vector, *at) for at in steps or STEPS for vector in kinds]
    if not steps:
        points += [Point("prefill", "whole", vector, *at) for at in PROMPTS for vector in space.uniform_vectors()]
    np.random.default_rng(SEED).shuffle(points)
    points.sort(key=lambda point: (point.phase, point.batch, point.length))  # shuffled within a workload
    pool, about = pool_for(space, points), machine()
    earlier = [pd.read_csv(file)] if file.is_file() else []
    rows: list[dict[str, Any]] = []
    for point in points:
        with torch.inference_mode():
            call, _ = pool.prepare(point)
            ms = lasting_ms(partial(step_and_choice, call) if point.phase == "decode" else call)
        kind = kinds[point.groups]
        rows.append({"phase": point.phase, "kind": kind, "vector": format_vector(point.groups)})
        rows[-1] |= {"batch": point.batch, "length": point.length, "measured_ms": ms} | about
        print(point.phase, point.batch, point.length, kind, round(ms, 4), flush=True)
        write_atomically(file, partial(pd.concat([*earlier, pd.DataFrame(rows)]).to_csv, index=False))


def calibrate(folder: Path) -> None:
    """Writes `ENERGY` of a table: power and seconds of lasting steps of uniform models; and what follows from it."""
    space = load_space(SPACE)
    points = [
        Point("decode", "whole", vector, batch, POWER_CONTEXT)
        for vector in space.uniform_vectors()
        for batch in POWER_BATCHES
    ]
    pool, about, uuid = pool_for(space, points), machine(), str(torch.cuda.get_device_properties(0).uuid)
    rows = []
    for point in points:
        with torch.inference_mode():
            call, _ = pool.prepare(point)
            found = measure_energy(partial(step_and_choice, call), POWER_S, uuid, torch.cuda.synchronize)
        assert found is not None, "NVML has no energy counter here"
        values = [point.groups[0], point.batch, point.length, found.watts, found.joules_per_call]
        rows.append([*values, found.seconds, found.calls, "energy counter", about["commit"], about["date"]])
        print(rows[-1], flush=True)
        write_csv(folder / ENERGY, pd.DataFrame(rows, columns=[*ENERGY_COLUMNS, "commit", "date"]))
    relate(folder)


def relate(folder: Path) -> None:
    """Writes into latency.json how many times as long the lasting steps took as the table's, and when and by what."""
    energy, points, meta = pd.read_csv(folder / ENERGY), pd.read_csv(folder / TABLE), read_json(folder / META)
    layers = load_space(SPACE).shape.num_hidden_layers
    meta["lasting_load"] = lasting_load(energy, points, TableLatency(folder), layers)
    write_json(folder / META, meta | {"lasting_load_from": {key: energy[key].iloc[0] for key in ("date", "commit")}})


def beside_predictions(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds what the shipped tables predict: of lasting steps, and of short runs."""
    tables = {device: TableLatency(table_folder(device)) for device in rows["device"].unique()}
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
    """docs/latency.md's table: the workloads at which many vectors were timed."""
    lines = ["| card, hour (UTC) | decode step | mean error | worst | uniform, worst | Kendall τ | short runs, mean |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in found[found["tau"].notna() & (found["phase"] == "decode")].to_dict("records"):
        session = f"{row['device'].split()[1]}, {row['date'][11:16]}"
        lines.append(
            f"| {session} | batch {row['batch']}, context {row['length']} | {row['mean']:.2%} | {row['worst']:.2%} | "
            f"{row['uniform_worst']:.2%} | {row['tau']:.3f} | {row['short_mean']:.2%} |"
        )
    return "\n".join(lines)


def table_folder(device: str) -> Path:
    """The shipped table of a device, by its name in NVML."""
    return shipped("latency_models") / "-".join(device.lower().split()) / f"{SPACE}-bf16-{RUNTIME}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["measure", "calibrate"], help="default: the errors")
    parser.add_argument("steps", nargs="*", metavar="BATCHxCONTEXT", help="of measure; default: eight")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if options.what == "measure":
        measure(
            OUT / "lasting.csv",
            [(int(batch), int(context)) for batch, context in (s.split("x") for s in options.steps)],
        )
    elif options.what == "calibrate":
        calibrate(table_folder(machine()["device"]))
    else:
        found = errors(beside_predictions(pd.read_csv(OUT / "lasting.csv")))
        write_csv(OUT / "lasting_errors.csv", found)
        print(found.round(4).to_string(index=False), markdown(found), sep="\n\n")


if __name__ == "__main__":
    main()
