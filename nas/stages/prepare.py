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
from typing import Any

import pandas as pd
from optuna.samplers import BaseSampler

from nas import console
from nas.budget import Budget, parse_budget
from nas.config import Search, build
from nas.data import TokenData
from nas.errors import AlreadyFinishedError, UserError
from nas.files import value_hash, without_passwords
from nas.latency import Predictor, find_device, resolve_workload
from nas.latency.cost import predictions
from nas.latency.memory import check_memory
from nas.metrics import LIMITS
from nas.model.pretrained import Checkpoint
from nas.quality import InheritedLoss
from nas.run import FinishedRun, begun_otherwise, find_runs, found_or_made, is_run, recorded_config, recorded_parent
from nas.search import Constraints, Membership, Objectives, Problem, Storage, search
from nas.search.claims import check_facts
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

_NOT_ASKED = ("name", "runs_dir", "workers", "worker")  # a search may go on with others
_AGREED = ("objectives", "constraints", "sampler", "seed", "budget", "heartbeat_s")  # all workers on a study the same
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # the name of a run that was given none
_MOST = 200_000  # vectors that budget=all may mean


@dataclass(frozen=True)
class Prepared:
    """A search and all that it needs, found or made.

    Attributes:
        problem: What is searched.
        loss: The problem's loss.
        make_sampler: Makes the sampler from a ``seed``.
        budget: When to stop.
        seed: Seeds the sampler.
        storage: Where the study lives.
        warm: What earlier searches leave to this one.
        latency: Predicts what vectors cost.
        asked: The resolved config.
        parents: The finished runs that the search builds on.
        facts: What all workers must have in common.
    """

    problem: Problem
    loss: InheritedLoss
    make_sampler: Callable[..., BaseSampler]
    budget: Budget
    seed: int
    storage: Storage
    warm: WarmStart
    latency: Predictor
    asked: dict[str, Any]
    parents: dict[str, FinishedRun]
    facts: dict[str, str]

    def search(self, membership: Membership) -> pd.DataFrame:
        """Works on the study until it is done; returns all evaluated vectors."""
        return search(
            self.problem,
            self.make_sampler,
            self.budget,
            self.seed,
            self.storage,
            membership=membership,
            known=list(self.warm.known),
            proposed=self.warm.proposed,
            facts=self.facts,
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
    storage = Storage(config.storage, config.name) if config.storage else Storage.file(path / "study.db")
    if config.storage and _TIMESTAMP.fullmatch(config.name):
        raise UserError("storage is given but no name; give all workers the same name=, which is the study's")
    earlier = earlier_searches(config, space)
    device = find_device(config.device)
    workload = resolve_workload(config.workload, space.shape, device)
    check_memory(space, device, workload)
    settings = dataclasses.asdict(config)
    facts = {key: json.dumps(settings[key], sort_keys=True) for key in _AGREED}
    facts |= {"space": f"{space.name} {value_hash(space.to_dict())}", "workload": str(workload)}
    if config.storage:
        check_facts(storage, facts)

    begun_or_named = config.supernet or recorded_config(path)
    ours, trained = space_identity(space.to_dict()), find_runs(runs_dir, "train")
    if not begun_or_named and all(space_identity(run.config["space"]) != ours for run in trained):
        check_trainable(config.train, space)  # before any text is read
    data = supernet_data(config, space)
    wanted = supernet_config(config, space, init, data)
    supernet = _supernet(config, path, wanted)
    latency = find_latency(config, path, space, device, workload)  # takes minutes at most, so before any training
    console.print(
        f"Latency on {device.name} ({workload}): {latency.describe()}"
        + (f" ({latency.folder})" if latency.folder else "")
    )
    limits = dataclasses.asdict(config.constraints)
    needed = [*objectives.names, *(LIMITS[key].name for key, bound in limits.items() if bound is not None)]
    costs = predictions(space, device, latency, workload, config.cost, needed)
    constraints = Constraints(limits, space, costs)
    facts["latency"] = f"{device.name}, {latency.digest[:12] if latency.digest else latency.describe()}"
    if config.storage:
        check_facts(storage, facts)
    supernet = supernet or found_or_made(
        partial(find_supernet, runs_dir, wanted),
        partial(_train, config, space, init, data, f"{space.name}-{value_hash(wanted)}"),
    )
    console.print(f"Supernet: {supernet.path}")
    loss = inherited_loss(supernet, data, config.train.validation_windows, runs_dir)
    windows = list(loss.windows.shape)
    warm = warm_start(earlier, space, supernet, windows)
    warm.enter(loss)
    if earlier:
        console.print(warm.describe())

    facts |= {
        "supernet": supernet.digest()[:12],
        "validation": f"{windows[0]} windows of {windows[1]} tokens of {data.digest[:12]}",
        "warm_start": value_hash([list(warm.known.items()), warm.proposed]),
    }
    if config.storage:
        check_facts(storage, facts)
    parents = {"supernet": supernet} | {f"warm_start_{number}": run for number, run in enumerate(earlier)}
    if latency.folder and is_run(latency.folder):
        parents["latency"] = FinishedRun(latency.folder, "measure")
    asked = settings | {
        "space": {"name": space.name, **space.to_dict()},
        "init": wanted["init"],
        "device": device.slug,
        "workload": dataclasses.asdict(workload),
        "windows": windows,
        "latency": _words(path, latency),
        "latency_table": latency.digest,
        "storage": without_passwords(config.storage) if config.storage else None,
    }
    asked = {key: value for key, value in asked.items() if key not in _NOT_ASKED}
    problem = Problem(space, objectives, loss, costs, constraints)
    return Prepared(problem, loss, make_sampler, budget, config.seed, storage, warm, latency, asked, parents, facts)


def _words(path: Path, latency: Predictor) -> str:
    """What is said of a latency model: of the same table what was said when the search was begun."""
    begun = recorded_config(path)
    same = begun and latency.digest and begun.get("latency_table") == latency.digest
    return str(begun["latency"]) if begun and same else latency.describe()


def _supernet(config: Search, path: Path, wanted: dict[str, Any]) -> FinishedRun | None:
    """The supernet that the user names, or that an interrupted search in ``path`` was begun with, or one that fits."""
    supernet = FinishedRun(Path(config.supernet), "train") if config.supernet else recorded_parent(path, "supernet")
    if supernet is None:
        return find_supernet(Path(config.runs_dir), wanted)
    theirs, ours = supernet_identity(supernet.config), supernet_identity(wanted)
    asked = ("space", "data", "init") if ours["init"] else ("space", "data")
    if different := [key for key in asked if theirs[key] != ours[key]]:
        if config.supernet:
            raise UserError(
                f"supernet {supernet.path} was trained with another {different[0]} than this search's; give the same "
                f"{different[0]}="
            )
        raise begun_otherwise(path, different[0])
    return supernet


def _train(config: Search, space: SearchSpace, init: Checkpoint | None, data: TokenData, name: str) -> FinishedRun:
    console.print("No trained supernet fits this space, data and training: training one first")
    path = Path(config.runs_dir) / "train" / name
    try:
        return train_supernet(config, space, init, data, path)
    except AlreadyFinishedError:  # another process finished it a moment ago
        return FinishedRun(path, "train")
