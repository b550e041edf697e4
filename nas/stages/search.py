"""nas search: the main job. Finds or makes a supernet and a latency table, and searches the front between them.

trials.csv          every evaluated vector, in order
front.csv           the same columns, the front alone, sorted by loss
landmarks.csv       names of the uniform and known vectors
latency_check.csv   predicted against measured whole models, where the table was measured
study.db            the Optuna study
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nas.config import Search, build, parse_budget
from nas.console import say
from nas.data import TokenData
from nas.errors import UserError
from nas.files import value_hash, write_atomically
from nas.latency import Device, LatencyModel, Workload, decode_ms, find_device, prefill_ms, resolve_workload
from nas.latency.estimate import RooflineLatency
from nas.latency.model import DTYPE_BYTES
from nas.latency.table import TableLatency
from nas.model.pretrained import Checkpoint
from nas.report.table import front_table
from nas.run import FinishedRun, find_runs, is_run, recorded_config, recorded_parent, start_run
from nas.search import Objectives, Storage, search
from nas.space import SearchSpace, Vector, format_vector
from nas.stages.measure import fitting_tables, measure_space, table_of
from nas.stages.train import (
    check_trainable,
    find_supernet,
    inherited_loss,
    settle,
    supernet_config,
    supernet_data,
    train_supernet,
)

_BEGUN_OTHERWISE = "{path} was begun with another {what}; repeat the first command to resume it, or give another name="


def run(config: Search, path: Path) -> None:
    """Searches into ``path``."""
    runs_dir = Path(config.runs_dir)
    config, space, init = settle(config)
    objectives = Objectives(tuple(config.objectives))
    budget = parse_budget(config.budget)
    make_sampler = build(config.sampler, _partial_=True)
    build(config.sampler, seed=config.seed)  # refuses wrong values before anything is trained in vain
    device = find_device(config.device)
    workload = resolve_workload(config.workload, space.shape, device)

    begun_or_named = config.supernet or recorded_config(path)
    if not begun_or_named and space.name not in {run.config["space"]["name"] for run in find_runs(runs_dir, "train")}:
        check_trainable(config.train, space)  # before any text is read
    data = supernet_data(config, space)
    wanted = supernet_config(config, space, init, data)
    supernet = _supernet(config, path, wanted)
    latency = _latency(config, path, space, device, workload)  # takes minutes at most, so before any training
    say(f"Latency on {device.name} ({workload}): {latency.describe()}")
    supernet = supernet or _train(config, space, init, data, f"{space.name}-{value_hash(wanted)}")
    say(f"Supernet: {supernet.path}")
    loss = inherited_loss(supernet, data, config.train.validation_windows, runs_dir)

    parents = {"supernet": supernet}
    table = latency if isinstance(latency, TableLatency) else None
    if table and is_run(table.folder):
        parents["latency"] = FinishedRun(table.folder, "measure")
    asked = dataclasses.asdict(config) | {
        "space": {"name": space.name, **space.to_dict()},
        "init": wanted["init"],
        "device": device.slug,
        "workload": dataclasses.asdict(workload),
        "windows": list(loss.windows.shape),
        "latency": latency.describe(),
        "latency_table": table.digest() if table else None,
    }
    del asked["name"], asked["runs_dir"]
    with start_run(path, "search", asked, {"search": config.seed}, parents) as run:
        say(f"Searching {space.size:,} vectors of {space.name}, budget {config.budget}, in {path}")
        evaluate = _evaluator(space, loss, latency, workload)
        trials = search(space, objectives, make_sampler, evaluate, budget, config.seed, Storage.file(path / "study.db"))
        front = _write_tables(path, trials, space, table.check() if table else None)
        run.finish()
    say(front_table(front))
    say(f"{len(front)} of {len(trials)} evaluated vectors are on the front: {path / 'front.csv'}")


def _supernet(config: Search, path: Path, wanted: dict[str, Any]) -> FinishedRun | None:
    """The supernet that the user names, or that an interrupted search in ``path`` was begun with, or one that fits."""
    supernet = FinishedRun(Path(config.supernet), "train") if config.supernet else recorded_parent(path, "supernet")
    if supernet is None:
        return find_supernet(Path(config.runs_dir), wanted)
    theirs = supernet.config
    same = {
        "space": theirs["space"] == wanted["space"],
        "data": theirs["data"]["digest"] == wanted["data"]["digest"],
        "init": wanted["init"] in (None, theirs.get("init")),
    }
    if different := [key for key, equal in same.items() if not equal]:
        if config.supernet:
            raise UserError(
                f"supernet {supernet.path} was trained with another {different[0]} than this search's; give the same "
                f"{different[0]}="
            )
        raise UserError(_BEGUN_OTHERWISE.format(path=path, what=different[0]))
    return supernet


def _train(config: Search, space: SearchSpace, init: Checkpoint | None, data: TokenData, name: str) -> FinishedRun:
    say("No trained supernet fits this space, data and training: training one first")
    return train_supernet(config, space, init, data, Path(config.runs_dir) / "train" / name)


def _latency(config: Search, path: Path, space: SearchSpace, device: Device, workload: Workload) -> LatencyModel:
    """Named, as an interrupted search was begun, found, measured now where the device is at hand, else estimated."""
    runs_dir = Path(config.runs_dir)
    if config.latency:
        table = table_of(FinishedRun(Path(config.latency), "measure"))
        if not table.fits(device.slug, space, workload):
            raise UserError(
                f"latency {config.latency} does not cover {space.name} on {device.slug} at {workload}; measure that"
            )
        return table
    begun, tables = recorded_config(path), fitting_tables(runs_dir, device, space, workload)
    if begun and begun["latency_table"]:
        same = (table for table in tables if table.digest() == begun["latency_table"])
        if found := next(same, None):
            return found
        raise UserError(_BEGUN_OTHERWISE.format(path=path, what="space, device, workload or latency table"))
    if not begun and (found := next(tables, None)):
        return found
    if begun or config.device != "this":
        return RooflineLatency(device, space.shape, workload.dtype)
    say("No measured table covers this space, device and workload: measuring first")
    facts: list[Any] = [space.to_dict(), device.slug, dataclasses.asdict(workload), dataclasses.asdict(config.measure)]
    name = f"{space.name}-{device.slug}-{value_hash([*facts, config.check])}"
    return measure_space(config, space, device, workload, runs_dir / "measure" / name)


def _write_tables(path: Path, trials: pd.DataFrame, space: SearchSpace, check: pd.DataFrame | None) -> pd.DataFrame:
    """Writes the CSVs that reports are drawn from; returns the front."""
    front = trials[trials["on_front"]].sort_values("loss_nats")
    named = [(name, format_vector(vector)) for name, vector in space.landmarks().items()]
    tables = {"trials": trials, "front": front, "landmarks": pd.DataFrame(named, columns=["name", "vector"])}
    if check is not None:
        tables["latency_check"] = check
    for name, table in tables.items():
        write_atomically(path / f"{name}.csv", partial(table.to_csv, index=False))
    return front


def _evaluator(
    space: SearchSpace, loss: Callable[[Vector], float], latency: LatencyModel, workload: Workload
) -> Callable[[Vector], dict[str, float | int | str]]:
    def evaluate(vector: Vector) -> dict[str, float | int | str]:
        step_ms = decode_ms(latency, vector, workload)
        return {
            "loss_nats": loss(vector),
            "decode_ms": step_ms,
            "prefill_ms": prefill_ms(latency, vector, workload),
            "tokens_per_s": 1e3 * workload.batch / step_ms,
            "batch": workload.batch,
            "kv_bytes_per_token": space.shape.kv_bytes_per_token(vector, DTYPE_BYTES[workload.dtype]),
            "parameters": space.shape.parameters(vector),
            "latency_source": latency.source,
        }

    return evaluate
