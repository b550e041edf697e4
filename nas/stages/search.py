"""nas search: the main job. Finds or makes a supernet and a latency table, and searches the front between them.

trials.csv          every evaluated vector, in order
front.csv           the same columns, the front alone, sorted by loss
latency_check.csv   predicted against measured end-to-end models, where the table was measured
study.db            the Optuna study, unless storage= names another database

Whether a process may go on with a search is decided by its config, against that in run.json (`check_begun`); by its
supernet and latency table, against the run's parents (`start_run`); and, for workers on a shared study, by what
`_agree` collects, against the study's metadata (`Storage`).
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd

from nas import console
from nas.config import Search, build
from nas.errors import InUseError, UserError, without_passwords
from nas.files import read_csv, value_hash, write_csv
from nas.latency import find_device, resolve_workload
from nas.latency.cost import cost_function
from nas.latency.memory import check_serving_memory
from nas.metrics import COLUMNS, LIMITS, PAIRED_SE, Metrics
from nas.model.pretrained import resolve_space
from nas.quality import InheritedLoss
from nas.report.front import front_table
from nas.run import FinishedRun, check_begun, find_or_make, is_run, start_run
from nas.search import Objectives, Problem, Storage, search
from nas.search.problem import EVERYTHING, Budget, parse_budget
from nas.search.sampler import PROMISED
from nas.space import SearchSpace, Vector, format_vector, parse_vector, searched_space
from nas.stages.measure import find_latency
from nas.stages.train import Training, find_supernet, inherited_loss, supernet_identity
from nas.stages.workers import more_workers

_INCIDENTAL = ("name", "runs_dir", "logger", "workers", "worker", "latency")  # not compared; of latency, the table is
_COMMON = ("objectives", "constraints", "sampler", "seed", "budget", "heartbeat_s")  # to all workers on a study
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # the name that conf/base.yaml gives
_MOST = 20_000  # vectors that budget=all may mean


def run(config: Search, path: Path) -> None:
    """Searches into ``path``."""
    prepared = _Prepared(config, path)
    problem, parents = prepared.problem, prepared.parents
    try:
        with start_run(path, "search", prepared.recorded, {"search": config.seed}, parents, free=["latency"]) as run:
            kept = f"{problem.size:,} of " if problem.size < problem.space.size else ""
            vectors = f"{kept}{problem.space.size:,} vectors of {searched_space(prepared.recorded)[1]}"
            console.print(f"Searching {vectors}, budget {config.budget}, in {path}")
            if config.budget == "all" and not config.storage:
                prepared.loss.of(list(problem.vectors()))  # together, far faster than one by one
            with more_workers(partial(_assist, config, path), config.workers):
                # Whoever holds the run directory knows that no other process of this run lives.
                trials = prepared.work(running="wait" if config.storage else "fail")
            if why := trials.attrs["stopped"]:
                console.print(f"Stopped after {len(trials)} evaluations: {why}")
                run.log(stopped=why)
            front = trials[trials["on_front"]].sort_values("loss_nats")
            for name, table in (("trials", trials), ("front", front), ("latency_check", prepared.latency.check())):
                if table is not None:
                    write_csv(path / f"{name}.csv", table)
            run.finish()
    except InUseError:
        if not config.storage:
            raise
        console.print(f"Another process writes {path}: this one only evaluates for it")
        with more_workers(partial(_assist, config, path), config.workers):
            prepared.work(running="ignore")
        return
    console.print(front_table(front, prepared.problem.objectives))
    console.print(f"{len(front)} of {len(trials)} evaluated vectors are on the front: {path / 'front.csv'}")
    if PAIRED_SE in trials:
        console.print(
            f"Differences to the largest vector's loss have a standard error of {trials[PAIRED_SE].median():.1g} nats "
            f"in the median ({PAIRED_SE}); four times as many train.validation_windows would halve it"
        )


def _assist(config: Search, path: Path) -> None:
    """Works on the search that another process of this machine has begun in ``path``."""
    _Prepared(config, path).work(running="ignore")


class _Prepared:
    """A search with all that it needs, found or made; what cannot work is refused before anything that takes longer.

    The config comes first, then the text (minutes where it is not tokenised yet), the latency table (minutes where it
    must be measured), the limits, which need that table, and the supernet (its training takes longest).
    """

    def __init__(self, config: Search, path: Path) -> None:
        self._config, self._training = config, (training := Training(config))
        # The space of all that follows, whose costs count; of the trained one only the losses do.
        space = training.space.served_as(resolve_space(config.serve)) if config.serve else training.space
        objectives, self._budget = Objectives(tuple(config.objectives)), _budget(config, space)
        self._storage, self._metadata = _storage(config, path), dict[str, str]()
        earlier = _earlier_searches(config, space)
        device = find_device(config.device)
        workload = resolve_workload(config.workload, space.shape, device)
        check_serving_memory(space, device, workload)
        self.recorded = {key: value for key, value in dataclasses.asdict(config).items() if key not in _INCIDENTAL} | {
            "serve": {"name": space.name, **space.to_dict()} if config.serve else None,
            "device": device.slug,
            "workload": workload.to_dict(),
            "storage": without_passwords(config.storage) if config.storage else None,
        }
        spaces = [training.space, space] if config.serve else [space]
        self._agree(
            **{key: json.dumps(self.recorded[key], sort_keys=True) for key in _COMMON},
            space=" served as ".join(f"{one.name} {value_hash(one.to_dict())}" for one in spaces),
            workload=str(workload),
        )
        self.recorded |= training.recorded  # reads the text
        begun = check_begun(path, "search", self.recorded)
        supernet = _find_supernet(config, training)
        if begun and not supernet:
            raise UserError("the supernet that this search was begun with is gone; restore it, or give another name=")
        if not supernet:
            training.check_memory()
        # Takes minutes at most, so before any training.
        self.latency = latency = find_latency(config, begun, space, device, workload)
        described = f"{latency.description} ({latency.folder})" if latency.folder else latency.description
        console.print(f"Latency on {device.name} ({workload}): {described}")
        limits = dataclasses.asdict(config.constraints)
        needed = [*objectives.names, *(LIMITS[key].name for key, bound in limits.items() if bound is not None)]
        costs = cost_function(space, device, latency, workload, config.cost, needed)
        self.problem = Problem(space, objectives, costs, limits)
        self._agree(latency=f"{device.name}, {latency.digest[:12] if latency.digest else latency.description}")
        self._take_losses(supernet or _make_supernet(training, Path(config.runs_dir)), earlier)

    def _take_losses(self, supernet: FinishedRun, earlier: list[FinishedRun]) -> None:
        console.print(f"Supernet: {supernet.path}")
        config, data, latency = self._config, self._training.data, self.latency
        self.loss = inherited_loss(supernet, data, config.train.validation_windows, Path(config.runs_dir))
        windows, precision = list(self.loss.windows.shape), self.loss.precision
        in_fp16 = " in fp16" if precision == "fp16" else ""  # once it never was
        self._known, self._proposed, self._errors = _taken_over(earlier, supernet, self.loss)
        self._agree(
            supernet=supernet.digest()[:12],
            validation=f"{windows[0]} windows of {windows[1]} tokens of {data.digest[:12]}{in_fp16}",
            warm_start=value_hash([list(self._known.items()), self._proposed]),
        )
        self.parents = {"supernet": supernet} | {f"warm_start_{number}": run for number, run in enumerate(earlier)}
        if latency.folder and is_run(latency.folder):
            self.parents["latency"] = FinishedRun(latency.folder, "measure")
        self.recorded |= {"windows": windows, "latency": latency.description, "latency_table": latency.digest}
        self.recorded |= {"precision": precision} if in_fp16 else {}

    def _agree(self, **metadata: str) -> None:
        """Adds to what all workers of a study must have in common."""
        self._metadata.update(metadata)
        if self._config.storage:
            self._storage.check(self._metadata)

    def work(self, running: Literal["fail", "wait", "ignore"]) -> pd.DataFrame:
        """Evaluates vectors; ``running`` says what becomes of trials that run already, as in `search`."""
        return search(
            self.problem,
            self.loss,
            build(self._config.sampler, _partial_=True),
            self._budget,
            self._config.seed,
            self._storage,
            running=running,
            known=list(self._known),
            proposed=self._proposed,
            metadata=self._metadata,
            noise=lambda vector: self.loss.noise(vector) or self._errors.get(vector, {}),
        )


def _budget(config: Search, space: SearchSpace) -> Budget:
    """The budget, which neither the space nor the sampler must rule out."""
    budget = parse_budget(config.budget)
    if budget == EVERYTHING and space.size > _MOST:
        raise UserError(f"budget=all is too much for the {space.size:,} vectors of {space.name}; give a number")
    sampler = build(config.sampler, seed=config.seed)  # refuses wrong values before anything is trained in vain
    if budget.auto and not hasattr(sampler, PROMISED):
        raise UserError(
            f"budget=auto needs a sampler that expects something of its proposals, which {type(sampler).__name__} "
            "does not; use sampler=front, or give a number of evaluations"
        )
    return budget


def _storage(config: Search, path: Path) -> Storage:
    if not config.storage:
        return Storage.file(path / "study.db", config.heartbeat_s)
    if _TIMESTAMP.fullmatch(config.name):
        raise UserError("storage is given but no name; give all workers the same name=, which is the study's")
    return Storage(config.storage, config.name, config.heartbeat_s)


def _find_supernet(config: Search, training: Training) -> FinishedRun | None:
    """The supernet that such a training made, or that the user names: of the same space and text, however trained."""
    if not config.supernet:
        return find_supernet(Path(config.runs_dir), training.recorded)
    supernet = FinishedRun(Path(config.supernet), "train")
    theirs, ours = (
        identity | {"init": identity["init"].get("hash")}  # and not how its heads were merged
        for identity in map(supernet_identity, (supernet.config, training.recorded))
    )
    for key in ("space", "data", *(["init"] if ours["init"] else [])):
        if theirs[key] != ours[key]:
            fix = f"give the same {key}="
            raise UserError(f"supernet {supernet.path} was trained with another {key} than this search's; {fix}")
    return supernet


def _make_supernet(training: Training, runs_dir: Path) -> FinishedRun:
    console.print("No trained supernet fits this space, data and training: training one first")
    path = runs_dir / "train" / f"{training.space.name}-{value_hash(supernet_identity(training.recorded))}"
    # Its name says all that must be the same, so an interrupted training may differ in the rest.
    made = find_or_make(path, "train", partial(training.make, path, free=list(training.recorded)))
    return find_supernet(runs_dir, training.recorded) or made  # somebody else's may have been finished a little earlier


def _earlier_searches(config: Search, space: SearchSpace) -> list[FinishedRun]:
    """The searches that ``warm_start`` names; they must have had the same choices."""
    given = config.warm_start or []
    runs = [FinishedRun(Path(str(path)), "search") for path in (given if isinstance(given, list) else [given])]
    for run in runs:
        if run.config["space"]["kv_groups"] != space.to_dict()["kv_groups"]:
            raise UserError(f"warm_start {run.path} searched other kv_groups than those of {space.name}; leave it out")
    return runs


def _taken_over(
    earlier: Sequence[FinishedRun], supernet: FinishedRun, loss: InheritedLoss
) -> tuple[dict[Vector, float], list[Vector], dict[Vector, Metrics]]:
    """Losses that earlier searches know, which ``loss`` then knows too, vectors that are worth evaluating early, and
    the losses' standard errors.

    A loss holds where supernet, validation windows and precision are the same. Of other searches the front is worth
    proposing.
    """
    known: dict[Vector, float] = {}
    proposed: list[Vector] = []
    errors: dict[Vector, Metrics] = {}
    ours = supernet.digest(), list(loss.windows.shape), loss.precision
    for run in earlier:
        theirs = run.parents["supernet"]["hash"], run.config["windows"], run.config.get("precision", "fp32")
        holds = ours == theirs
        table = read_csv(run.artifact("trials.csv" if holds else "front.csv"), COLUMNS)
        vectors = list(map(parse_vector, table["vector"]))
        if not holds:
            proposed += vectors
            continue
        known = dict(zip(vectors, table["loss_nats"].astype(float), strict=True)) | known
        if PAIRED_SE in table:
            told = zip(vectors, table[PAIRED_SE], strict=True)
            errors = {vector: {PAIRED_SE: error} for vector, error in told if pd.notna(error)} | errors
    names = {format_vector(vector): value for vector, value in known.items()}
    loss.memo.add({name: value for name, value in names.items() if name not in loss.memo})
    if earlier:
        console.print(
            f"From {', '.join(str(run.path) for run in earlier)}: {len(known)} losses taken over, {len(proposed)} "
            "vectors to be evaluated early"
        )
    return known, proposed, errors
