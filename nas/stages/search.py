"""nas search: the main job. Finds or makes a supernet and a latency table, and searches the front between them.

trials.csv          every evaluated vector, in order
front.csv           the same columns, the front alone, sorted by loss
latency_check.csv   predicted against measured whole models, where the table was measured
study.db            the Optuna study
"""

from functools import partial
from pathlib import Path

import pandas as pd

from nas import console
from nas.config import Search
from nas.errors import InUseError
from nas.files import write_atomically
from nas.report.front import front_table
from nas.run import start_run
from nas.stages.prepare import decisive, prepare
from nas.stages.workers import more_workers


def run(config: Search, path: Path) -> None:
    """Searches into ``path``."""
    prepared = prepare(config, path)
    problem = prepared.problem
    try:
        with start_run(path, "search", prepared.recorded, {"search": config.seed}, prepared.parents, decisive) as run:
            kept = f"{problem.size:,} of " if problem.size < problem.space.size else ""
            vectors = f"{kept}{problem.space.size:,} vectors of {problem.space.name}"
            console.print(f"Searching {vectors}, budget {config.budget}, in {path}")
            if prepared.budget.is_everything and not config.storage:
                prepared.loss.of(list(problem.vectors()))  # together, far faster than one by one
            with more_workers(partial(_assist, config, path), config.workers):
                # Whoever holds the run directory knows that no other process of this run lives.
                trials = prepared.search("wait" if config.storage else "fail")
            front = _write_tables(path, trials, prepared.latency.check())
            run.finish()
    except InUseError:
        if not config.storage:
            raise
        console.print(f"Another process writes {path}: this one only evaluates for it")
        prepared.search("ignore")
        return
    console.print(front_table(front))
    console.print(f"{len(front)} of {len(trials)} evaluated vectors are on the front: {path / 'front.csv'}")


def _assist(config: Search, path: Path) -> None:
    """Works on the search that another process of this machine has begun in ``path``."""
    prepare(config, path).search("ignore")


def _write_tables(path: Path, trials: pd.DataFrame, check: pd.DataFrame | None) -> pd.DataFrame:
    """Writes the CSVs that reports are drawn from; returns the front."""
    front = trials[trials["on_front"]].sort_values("loss_nats")
    tables = {"trials": trials, "front": front}
    if check is not None:
        tables["latency_check"] = check
    for name, table in tables.items():
        write_atomically(path / f"{name}.csv", partial(table.to_csv, index=False))
    return front
