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
from nas.data import validation_windows
from nas.errors import UserError
from nas.latency import Device, LatencyModel, Workload, decode_ms, find_device, prefill_ms, resolve_workload
from nas.latency.estimate import RooflineLatency
from nas.latency.model import DTYPE_BYTES
from nas.latency.table import CHECK, TableLatency
from nas.model.checkpoint import load_supernet
from nas.quality import InheritedLoss
from nas.report.table import front_table
from nas.run import FinishedRun, find_runs, start_run, value_hash, write_atomically
from nas.search import Objectives, search
from nas.space import SearchSpace, Vector, format_vector, load_space
from nas.stages.measure import find_table, measure_space, table_of
from nas.stages.train import (
    check_trainable,
    find_supernet,
    supernet_config,
    supernet_data,
    train_supernet,
    window_length,
)
from nas.training import training_device


def run(config: Search, path: Path) -> None:
    """Searches into ``path``."""
    space = load_space(config.space)
    objectives = Objectives(tuple(config.objectives))
    budget = parse_budget(config.budget)
    make_sampler = build(config.sampler, _partial_=True)
    build(config.sampler, seed=config.seed)  # refuses wrong values before anything is trained in vain
    device = find_device(config.device)
    workload = resolve_workload(config.workload, space.shape, device)

    given = _given_table(config, space, device, workload)
    supernet, loss = _quality(config, space)
    latency = given or _latency(config, space, device, workload)
    say(f"Latency on {device.name} ({workload}): {latency.describe()}")
    parents = {"supernet": supernet}
    if isinstance(latency, TableLatency) and (latency.folder / "run.json").is_file():
        parents["latency"] = FinishedRun(latency.folder, "measure")
    asked = {
        "space": {"name": space.name, **space.to_dict()},
        "device": device.slug,
        "workload": dataclasses.asdict(workload),
        "objectives": list(objectives.names),
        "sampler": config.sampler,
        "budget": config.budget,
        "seed": config.seed,
        "validation_windows": config.train.validation_windows,
        "latency": latency.describe(),
    }
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


def _quality(config: Search, space: SearchSpace) -> tuple[FinishedRun, Callable[[Vector], float]]:
    """The supernet to search (given, found or trained now) and the inherited loss of its vectors."""
    runs_dir = Path(config.runs_dir)
    trained = (run.config["space"]["name"] for run in find_runs(runs_dir, "train"))
    if config.supernet is None and space.name not in trained:
        check_trainable(config.train, space)
    data = supernet_data(config, space)
    wanted = supernet_config(config, space, data)
    if config.supernet is None:
        supernet = find_supernet(runs_dir, wanted)
        if supernet is None:
            say("No trained supernet fits this space, data and training: training one first")
            path = runs_dir / "train" / f"{space.name}-{value_hash(wanted)}"
            supernet = train_supernet(config, space, data, path)
    else:
        supernet = FinishedRun(Path(config.supernet), "train")
        theirs = supernet.config
        same = {"space": theirs["space"] == wanted["space"], "data": theirs["data"]["digest"] == data.digest}
        if different := [key for key, equal in same.items() if not equal]:
            raise UserError(
                f"supernet {supernet.path} was not trained on the {different[0]} of this search; give the same "
                f"{different[0]}="
            )
    say(f"Supernet: {supernet.path}")
    length = window_length(config.train, space.shape.max_position_embeddings)
    windows = validation_windows(data.validation, config.train.validation_windows, length)
    memo = runs_dir / "cache" / f"losses-{value_hash([supernet.digest(), list(windows.shape), data.digest])}.jsonl"
    return supernet, InheritedLoss(load_supernet(supernet, training_device()), windows, memo)


def _given_table(config: Search, space: SearchSpace, device: Device, workload: Workload) -> TableLatency | None:
    if config.latency is None:
        return None
    table = table_of(FinishedRun(Path(config.latency), "measure"))
    if not table.fits(device.slug, space, workload):
        raise UserError(
            f"latency {config.latency} does not cover {space.name} on {device.slug} at {workload}; measure that"
        )
    return table


def _latency(config: Search, space: SearchSpace, device: Device, workload: Workload) -> LatencyModel:
    """Found, measured now where the device is at hand, else estimated."""
    runs_dir = Path(config.runs_dir)
    found = find_table(runs_dir, device, space, workload)
    if found is not None:
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
