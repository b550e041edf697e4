"""What a search needs before it can begin: its problem, a latency model, a supernet; found where they are, else made.

What is cheap and can refuse comes first, training last.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from optuna.samplers import BaseSampler

from nas import console
from nas.budget import Budget, parse_budget
from nas.config import Search, build
from nas.data import TokenData
from nas.errors import UserError
from nas.files import value_hash, without_passwords
from nas.latency import Predictor, find_device, resolve_workload
from nas.latency.cost import predictions
from nas.latency.memory import check_memory
from nas.metrics import LIMITS
from nas.model.pretrained import Checkpoint
from nas.quality import InheritedLoss
from nas.run import FinishedRun, check_begun, find_or_make, find_runs, is_run
from nas.search import Objectives, Problem, Storage, search
from nas.space import SearchSpace
from nas.stages.latency import find_latency
from nas.stages.train import (
    check_trainable,
    find_supernet,
    inherited_loss,
    resolve,
    space_identity,
    supernet_config,
    supernet_data,
    supernet_identity,
    train_supernet,
)
from nas.stages.warm_start import WarmStart, earlier_searches, warm_start

_INCIDENTAL = ("name", "runs_dir", "workers", "worker", "latency")  # a search may go on with others
_COMMON = ("objectives", "constraints", "sampler", "seed", "budget", "heartbeat_s")  # to all workers on a study
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # the name of a run that was given none
_MOST = 200_000  # vectors that budget=all may mean


@dataclass(frozen=True)
class Prepared:
    """A search and all that it needs, found or made.

    ``recorded`` is the resolved config for run.json, ``metadata`` what all workers must have in common.
    """

    problem: Problem
    loss: InheritedLoss
    make_sampler: Callable[..., BaseSampler]
    budget: Budget
    seed: int
    storage: Storage
    warm: WarmStart
    latency: Predictor
    recorded: dict[str, Any]
    parents: dict[str, FinishedRun]
    metadata: dict[str, str]

    def search(self, running: Literal["fail", "wait", "ignore"]) -> pd.DataFrame:
        """Works on the study until it is done; returns all evaluated vectors. ``running`` is as for `search`."""
        return search(
            self.problem,
            self.loss,
            self.make_sampler,
            self.budget,
            self.seed,
            self.storage,
            running=running,
            known=list(self.warm.known),
            proposed=self.warm.proposed,
            metadata=self.metadata,
        )


def prepare(config: Search, path: Path) -> Prepared:
    """Finds or makes what the search ``path`` needs."""
    runs_dir = Path(config.runs_dir)
    config, space, init = resolve(config)
    objectives, budget = Objectives(tuple(config.objectives)), parse_budget(config.budget)
    if budget.is_everything and space.size > _MOST:
        raise UserError(f"budget=all is too much for the {space.size:,} vectors of {space.name}; give a number")
    make_sampler = build(config.sampler, _partial_=True)
    build(config.sampler, seed=config.seed)  # refuses wrong values before anything is trained in vain
    storage = _storage(config, path)
    earlier = earlier_searches(config, space)
    device = find_device(config.device)
    workload = resolve_workload(config.workload, space.shape, device)
    check_memory(space, device, workload)
    recorded = {key: value for key, value in dataclasses.asdict(config).items() if key not in _INCIDENTAL} | {
        "space": {"name": space.name, **space.to_dict()},
        "init": init.identity if init else None,
        "device": device.slug,
        "workload": dataclasses.asdict(workload),
        "storage": without_passwords(config.storage) if config.storage else None,
    }
    check_begun(path, "search", {key: value for key, value in recorded.items() if key != "data"})
    metadata = {key: json.dumps(recorded[key], sort_keys=True) for key in _COMMON}
    metadata |= {"space": f"{space.name} {value_hash(space.to_dict())}", "workload": str(workload)}
    if config.storage:
        storage.check(metadata)
    if not config.supernet and not _trained_before(space, runs_dir):
        check_trainable(config.train, space)  # before any text is read

    data = supernet_data(config, space)
    recorded["data"] = {**config.data, "digest": data.digest}
    check_begun(path, "search", recorded)
    training = supernet_config(config, space, init, data)
    supernet = _named_supernet(Path(config.supernet), training) if config.supernet else None
    latency = find_latency(config, path, space, device, workload)  # takes minutes at most, so before any training
    console.print(
        f"Latency on {device.name} ({workload}): {latency.describe()}"
        + (f" ({latency.folder})" if latency.folder else "")
    )
    limits = dataclasses.asdict(config.constraints)
    needed = [*objectives.names, *(LIMITS[key].name for key, bound in limits.items() if bound is not None)]
    costs = predictions(space, device, latency, workload, config.cost, needed)
    problem = Problem(space, objectives, costs, limits)
    metadata["latency"] = f"{device.name}, {latency.digest[:12] if latency.digest else latency.describe()}"
    if config.storage:
        storage.check(metadata)

    supernet = supernet or _supernet(config, space, init, data)
    console.print(f"Supernet: {supernet.path}")
    loss = inherited_loss(supernet, data, config.train.validation_windows, runs_dir)
    windows = list(loss.windows.shape)
    warm = warm_start(earlier, space, supernet, windows)
    warm.enter(loss)
    if earlier:
        console.print(warm.describe())
    metadata |= {
        "supernet": supernet.digest()[:12],
        "validation": f"{windows[0]} windows of {windows[1]} tokens of {data.digest[:12]}",
        "warm_start": value_hash([list(warm.known.items()), warm.proposed]),
    }
    if config.storage:
        storage.check(metadata)
    parents = {"supernet": supernet} | {f"warm_start_{number}": run for number, run in enumerate(earlier)}
    if latency.folder and is_run(latency.folder):
        parents["latency"] = FinishedRun(latency.folder, "measure")
    recorded |= {
        "windows": windows,
        "latency": latency.describe(),
        "latency_table": latency.digest,
    }
    return Prepared(
        problem, loss, make_sampler, budget, config.seed, storage, warm, latency, recorded, parents, metadata
    )


def decisive(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a resumed search must not change: all but the description of its latency model, which is prose."""
    return {key: value for key, value in recorded.items() if key != "latency"}


def _storage(config: Search, path: Path) -> Storage:
    if not config.storage:
        return Storage.file(path / "study.db", config.heartbeat_s)
    if _TIMESTAMP.fullmatch(config.name):
        raise UserError("storage is given but no name; give all workers the same name=, which is the study's")
    return Storage(config.storage, config.name, config.heartbeat_s)


def _trained_before(space: SearchSpace, runs_dir: Path) -> bool:
    ours = space_identity(space.to_dict())
    return any(space_identity(run.config["space"]) == ours for run in find_runs(runs_dir, "train"))


def _named_supernet(path: Path, training: dict[str, Any]) -> FinishedRun:
    """The supernet that the user names, however it was trained; its space and text must be the search's."""
    supernet = FinishedRun(path, "train")
    theirs, ours = supernet_identity(supernet.config), supernet_identity(training)
    for key in ("space", "data", *(["init"] if ours["init"] else [])):
        if theirs[key] != ours[key]:
            raise UserError(f"supernet {path} was trained with another {key} than this search's; give the same {key}=")
    return supernet


def _supernet(config: Search, space: SearchSpace, init: Checkpoint | None, data: TokenData) -> FinishedRun:
    """The supernet that such a training made, or else makes now."""
    runs_dir, training = Path(config.runs_dir), supernet_config(config, space, init, data)
    if found := find_supernet(runs_dir, training):
        return found
    console.print("No trained supernet fits this space, data and training: training one first")
    path = runs_dir / "train" / f"{space.name}-{value_hash(supernet_identity(training))}"
    made = find_or_make(path, "train", partial(train_supernet, config, space, init, data, path, supernet_identity))
    return find_supernet(runs_dir, training) or made  # somebody else's may have been finished a little earlier
