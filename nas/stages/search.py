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
from torch import Tensor

from nas.config import Search, build, parse_budget
from nas.console import say
from nas.data import validation_windows
from nas.errors import UserError
from nas.files import value_hash, write_atomically
from nas.latency import Device, LatencyModel, Workload, decode_ms, find_device, prefill_ms, resolve_workload
from nas.latency.estimate import RooflineLatency
from nas.latency.model import DTYPE_BYTES
from nas.latency.table import CHECK, TableLatency
from nas.model.checkpoint import load_supernet
from nas.quality import InheritedLoss
from nas.report.table import front_table
from nas.run import FinishedRun, find_runs, recorded_parent, start_run
from nas.search import Objectives, search
from nas.space import SearchSpace, Vector, format_vector, load_space
from nas.stages.measure import find_table, measure_space, table_of
from nas.stages.train import (
    check_trainable,
    find_supernet,
    supernet_config,
    supernet_data,
    supernet_identity,
    train_supernet,
)
from nas.training import training_device


def run(config: Search, path: Path) -> None:
    """Searches into ``path``."""
    runs_dir = Path(config.runs_dir)
    space = load_space(config.space)
    objectives = Objectives(tuple(config.objectives))
    budget = parse_budget(config.budget)
    make_sampler = build(config.sampler, _partial_=True)
    build(config.sampler, seed=config.seed)  # refuses wrong values before anything is trained in vain
    device = find_device(config.device)
    workload = resolve_workload(config.workload, space.shape, device)

    given = _given(config.supernet, path, "supernet", "train"), _given(config.latency, path, "latency", "measure")
    if given[0] is None and space.name not in {run.config["space"]["name"] for run in find_runs(runs_dir, "train")}:
        check_trainable(config.train, space)
    latency = _latency(config, given[1], space, device, workload)  # minutes; before the supernet, which takes longer
    supernet, loss, windows = _quality(config, given[0], space)
    say(f"Latency on {device.name} ({workload}): {latency.describe()}")
    parents = {"supernet": supernet}
    if isinstance(latency, TableLatency) and (latency.folder / "run.json").is_file():
        parents["latency"] = FinishedRun(latency.folder, "measure")
    asked = dataclasses.asdict(config) | {
        "space": {"name": space.name, **space.to_dict()},
        "device": device.slug,
        "workload": dataclasses.asdict(workload),
        "windows": list(windows.shape),
        "latency": latency.describe(),
    }
    del asked["name"], asked["runs_dir"]
    with start_run(path, "search", asked, {"search": config.seed}, parents) as run:
        say(f"Searching {space.size:,} vectors of {space.name}, budget {config.budget}, in {path}")
        evaluate = _evaluator(space, loss, latency, workload)
        trials = search(space, objectives, make_sampler, evaluate, budget, config.seed, path / "study.db")
        front = trials[trials["on_front"]].sort_values("loss_nats")
        names = pd.DataFrame(
            [(name, format_vector(vector)) for name, vector in space.landmarks().items()], columns=["name", "vector"]
        )
        tables = {"trials.csv": trials, "front.csv": front, "landmarks.csv": names}
        if isinstance(latency, TableLatency):
            tables["latency_check.csv"] = pd.read_csv(latency.folder / CHECK)
        for file, table in tables.items():
            write_atomically(path / file, partial(table.to_csv, index=False))
        run.finish()
    say(front_table(front))
    say(f"{len(front)} of {len(trials)} evaluated vectors are on the front: {path / 'front.csv'}")


def _given(folder: str | None, path: Path, role: str, stage: str) -> FinishedRun | None:
    """The parent that the user names, or else that an interrupted search in ``path`` was begun with."""
    return FinishedRun(Path(folder), stage) if folder else recorded_parent(path, role)


def _quality(
    config: Search, given: FinishedRun | None, space: SearchSpace
) -> tuple[FinishedRun, Callable[[Vector], float], Tensor]:
    """The supernet to search (given, found or trained now), the inherited loss of its vectors, and the windows."""
    runs_dir = Path(config.runs_dir)
    data = supernet_data(config, space)
    wanted = supernet_config(config, space, data)
    supernet = given or find_supernet(runs_dir, wanted)
    if supernet is None:
        say("No trained supernet fits this space, data and training: training one first")
        path = runs_dir / "train" / f"{space.name}-{value_hash(supernet_identity(wanted))}"
        supernet = train_supernet(config, space, data, path)
    theirs = supernet.config
    same = {"space": theirs["space"] == wanted["space"], "data": theirs["data"]["digest"] == data.digest}
    if different := [key for key, equal in same.items() if not equal]:
        raise UserError(
            f"supernet {supernet.path} was not trained on the {different[0]} of this search; give the same "
            f"{different[0]}="
        )
    say(f"Supernet: {supernet.path}")
    length = theirs["train"]["length"] or space.shape.max_position_embeddings
    windows = validation_windows(data.validation, config.train.validation_windows, length)
    memo = runs_dir / "cache" / f"losses-{value_hash([supernet.digest(), list(windows.shape), data.digest])}.jsonl"
    return supernet, InheritedLoss(load_supernet(supernet, training_device()), windows, memo), windows


def _latency(
    config: Search, given: FinishedRun | None, space: SearchSpace, device: Device, workload: Workload
) -> LatencyModel:
    """Given, found, measured now where the device is at hand, else estimated."""
    runs_dir = Path(config.runs_dir)
    if given:
        table = table_of(given)
        if not table.fits(device.slug, space, workload):
            raise UserError(
                f"latency {given.path} does not cover {space.name} on {device.slug} at {workload}; measure that"
            )
        return table
    if found := find_table(runs_dir, device, space, workload):
        return found
    if config.device != "this":
        return RooflineLatency(device, space.shape, workload.dtype)
    say("No measured table covers this space, device and workload: measuring first")
    facts: list[Any] = [space.to_dict(), device.slug, dataclasses.asdict(workload), dataclasses.asdict(config.measure)]
    path = runs_dir / "measure" / f"{space.name}-{device.slug}-{value_hash([*facts, config.check])}"
    return measure_space(config, space, device, workload, path)


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
