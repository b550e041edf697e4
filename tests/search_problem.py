"""A search problem whose losses are computed in no time, and a worker's process on it; needs no PyTorch."""

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import optuna
import sqlalchemy

from nas.metrics import Metrics
from nas.search import Objectives, Problem, Storage, search, study
from nas.search.front_sampler import FrontSampler
from nas.search.problem import Budget
from nas.space import SearchSpace, Vector, format_vector, load_space

SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "nsga2": functools.partial(optuna.samplers.NSGAIISampler, population_size=5),
    "tpe": functools.partial(optuna.samplers.TPESampler, n_startup_trials=5),
    "random": optuna.samplers.RandomSampler,
    "front": FrontSampler,
}
TWO = Objectives(("loss_nats", "tokens_per_s"))
PENALTIES = {1: 0.05, 2: 0.02, 4: 0.0}


def additive_loss(vector: Vector) -> float:
    """A loss that is a sum over layers, later layers mattering more."""
    return 3 + sum(PENALTIES[groups] * (layer + 1) for layer, groups in enumerate(vector))


def costs(vector: Vector) -> Metrics:
    """Costs that depend on the sum of groups."""
    decode_ms = 1 + 0.1 * sum(vector)
    return {
        "decode_ms": decode_ms,
        "prefill_ms": 5.0,
        "tokens_per_s": 1e3 / decode_ms,
        "batch": 1,
        "kv_bytes_per_token": 64 * sum(vector),
        "parameters": 1000 + sum(vector),
        "latency_source": "estimated",
    }


def problem(space: SearchSpace, objectives: Objectives = TWO, limits: Mapping[str, float] | None = None) -> Problem:
    """The problem of a space with these costs."""
    return Problem(space, objectives, costs, limits or {})


def work(
    storage: Storage,
    budget: int,
    folder: Path,
    name: str,
    sampler: str = "random",
    running: Literal["fail", "wait", "ignore"] = "ignore",
    pause_s: float = 0.0,
    dies_at: int | None = None,
) -> None:
    """Searches the tiny space; appends each vector that it begins with to NAME.log, and writes the result to NAME.csv.

    It kills itself right after so many transactions of its own as ``dies_at`` says.
    """

    def loss(vector: Vector) -> float:
        with (folder / f"{name}.log").open("a") as log:
            log.write(f"{format_vector(vector)}\n")
        time.sleep(pause_s)
        return additive_loss(vector)

    if dies_at is not None:
        commits = itertools.count(1)

        @sqlalchemy.event.listens_for(sqlalchemy.Engine, "commit")
        def die(_: sqlalchemy.Connection) -> None:
            if next(commits) == dies_at + 1:  # the event comes before the commit
                os.kill(os.getpid(), signal.SIGKILL)

    study._POLL_S = 0.05
    table = search(problem(load_space("tiny")), loss, SAMPLERS[sampler], Budget(budget), 0, storage, running=running)
    table.to_csv(folder / f"{name}.csv", index=False)
