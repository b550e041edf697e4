"""How much of the exact front's hypervolume each sampler finds, by evaluations.

Problems: `additive`, 32 layers whose losses add up; `adjacent`, the same with couplings of neighbouring layers; `real`,
the losses of all 6,561 vectors of a supernet of `tiny` (docs/search/tiny_losses.csv; docs/search.md says how it came to
be). Every search evaluates the uniform vectors first, and no vector twice, as `nas search` does. Shares are of the
hypervolume over a reference point at 1.05 times the worst uniform vector's loss and cost. Real losses lie so near each
other that even random vectors cover nearly all of that; `near` judges the same searches by the reference point of `nas
report`. `front` draws nothing at random in so small a space: its ten searches there are one. Searches that are in the
CSV already are not made again. The last line of stdout is JSON: median shares, and the milliseconds of its own that
`front` takes a trial.

    python scripts/bench_search.py [CSV [WORKERS]]      default: docs/search/bench.csv
    python scripts/bench_search.py draw                 only the figure and the last line, from that CSV
"""

import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd
from matplotlib.ticker import PercentFormatter

from nas.files import write_atomically
from nas.hardware import cpu_name
from nas.report.figure import COLOURS, figure
from nas.search import Objectives, reference_point
from nas.search.exact import best_by_counts
from nas.search.front_sampler import FrontSampler
from nas.search.loss_model import LayerLosses
from nas.search.problem import Problem as SearchProblem
from nas.search.sampler import DistinctSampler
from nas.space import SearchSpace, load_space, parse_vector

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

DOCS = Path(__file__).resolve().parent.parent / "docs" / "search"
PROBLEMS, SAMPLERS = ("additive", "adjacent", "real"), ("front", "random", "nsga2", "tpe")
PANELS = (*PROBLEMS, "near")
BUDGETS, SEEDS = (50, 100, 200, 500), range(10)
GROUPS = np.array([1, 2, 4])


@dataclass(frozen=True)
class Problem:
    """Losses of vectors, and the front that can be reached.

    Attributes:
        space: The search space.
        loss: Loss of a vector of groups.
        front: Loss and cost of the exact front's points.
    """

    space: SearchSpace
    loss: Callable[[tuple[int, ...]], float]
    front: Floats

    def references(self, name: str) -> dict[str, Floats]:
        """The hypervolume's reference points: one, for ``real`` also a near one, by the name of the panel."""
        uniform = self.space.uniform_vectors()
        columns = {"loss_nats": np.array(list(map(self.loss, uniform))), "decode_ms": costs_of(np.array(uniform))}
        far = {name: 1.05 * np.array([values.max() for values in columns.values()])}
        near = {"near": reference_point(pd.DataFrame(columns), Objectives(tuple(columns)))}
        return far | near if name == "real" else far


def costs_of(vectors_NL: Ints) -> Floats:
    """Milliseconds of a decode step, shape (N,)."""
    return np.asarray(7.389 + 0.0214 * (vectors_NL == 2).sum(axis=1) + 0.068 * (vectors_NL == 4).sum(axis=1))


@functools.lru_cache(maxsize=4)
def problem(name: str, seed: int) -> Problem:
    """A problem; the synthetic ones are drawn from the seed."""
    if name == "real":
        table = pd.read_csv(DOCS / "tiny_losses.csv")
        losses = {parse_vector(vector): loss for vector, loss in zip(table["vector"], table["loss_nats"], strict=True)}
        points = np.column_stack((table["loss_nats"], costs_of(np.array(list(losses)))))
        return Problem(load_space("tiny"), losses.__getitem__, points[moocore.is_nondominated(points)])
    space = load_space("decilm-6b")
    rng, layers = np.random.default_rng(seed), space.shape.num_hidden_layers
    ones = rng.gamma(2.0, 0.01, layers)
    penalties = np.stack((ones, ones * rng.uniform(0.3, 0.7, layers), np.zeros(layers)), axis=1)
    couplings = rng.normal(0.0, 0.005, (layers - 1, 3, 3)) * (name == "adjacent")
    truth, best = LayerLosses(0.0, penalties, couplings), best_by_counts(penalties, couplings)
    points = np.column_stack((best.losses_T, costs_of(GROUPS[best.vectors_TL])))

    def loss(vector: tuple[int, ...]) -> float:
        return float(truth.of(np.searchsorted(GROUPS, [vector]))[0])

    return Problem(space, loss, points[moocore.is_nondominated(points)])


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler with the settings of conf/sampler."""
    if name == "front":
        return FrontSampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=10, constant_liar=False)
    return optuna.samplers.RandomSampler(seed=seed)


def searched(name: str, sampler: str, seed: int) -> list[dict[str, Any]]:
    """One search: its share of the hypervolume after each budget, and the sampler's own time a trial so far."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = problem(name, seed)
    objectives, first = Objectives(("loss_nats", "decode_ms")), task.space.uniform_vectors()
    costs = functools.cache(lambda vector: {"decode_ms": costs_of(np.array([vector]))[0]})  # as a predictor does
    asked = SearchProblem(task.space, objectives, costs, {})
    distinct = DistinctSampler(functools.partial(make_sampler, sampler), asked, seed, first)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=distinct)
    points, seconds, rows = [], [], []
    for count in range(1, max(BUDGETS) + 1):
        begin = time.perf_counter()
        trial = study.ask()
        vector = tuple(trial.suggest_categorical(layer, groups) for layer, groups in distinct.choices.items())
        seconds.append(time.perf_counter() - begin)
        points.append((task.loss(vector), float(costs_of(np.array([vector]))[0])))
        study.tell(trial, points[-1])
        for panel, reference in task.references(name).items() if count in BUDGETS else ():
            found, most = (moocore.hypervolume(np.array(some), ref=reference) for some in (points, task.front))
            row = {"problem": panel, "sampler": sampler, "seed": seed, "evaluations": count, "share": found / most}
            rows.append(row | {"sampler_ms": 1e3 * statistics.median(seconds)})
    return rows


def missing(table: pd.DataFrame) -> Iterator[tuple[str, str, int]]:
    """The searches that a table does not have."""
    done = set(zip(table["problem"], table["sampler"], table["seed"], strict=True))
    everything = itertools.product(PROBLEMS, SAMPLERS, SEEDS)
    return (search for search in everything if search not in done)


def measure(file: Path, workers: int) -> None:
    """Makes the searches that the CSV lacks."""
    columns = ["problem", "sampler", "seed", "evaluations", "share", "sampler_ms", "cpu", "date"]
    table = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=columns)
    facts = {"cpu": cpu_name(), "date": datetime.now(UTC).date().isoformat()}
    with ProcessPoolExecutor(workers) as pool:
        for rows in pool.map(searched, *zip(*missing(table), strict=True)):
            table = pd.concat([table.dropna(how="all"), pd.DataFrame(rows).assign(**facts)])
            write_atomically(file, functools.partial(table.to_csv, index=False))
            shares = [round(row["share"], 4) for row in rows]
            print(*(rows[0][key] for key in ("problem", "sampler", "seed")), shares, flush=True)


def draw(table: pd.DataFrame) -> None:
    """One panel a problem: median and quartiles of the share by evaluations."""
    with figure(DOCS / "bench", width=12.6, height=3.9) as drawing:
        for axes, name in zip(drawing.subplots(1, len(PANELS)), PANELS, strict=True):
            for sampler, colour in zip(SAMPLERS, COLOURS, strict=False):
                rows = table[(table["problem"] == name) & (table["sampler"] == sampler)]
                shares = rows.groupby("evaluations")["share"]
                low, middle, high = (shares.quantile(part) for part in (0.25, 0.5, 0.75))
                axes.plot(middle.index, middle, marker="o", markersize=3, color=colour, label=sampler)
                axes.fill_between(middle.index, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(title=name, xlabel="evaluated vectors", xscale="log")
            axes.set_xticks(BUDGETS, map(str, BUDGETS))
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        drawing.axes[0].set_ylabel("share of the exact front's hypervolume")
        drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SAMPLERS))


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """Median shares, and what `front` takes."""
    medians = table.groupby(["problem", "sampler", "evaluations"], as_index=False)["share"].median()
    shares = {"_".join(map(str, row[:3])): round(row[3], 4) for row in medians.itertuples(index=False)}
    last = table[(table["sampler"] == "front") & (table["evaluations"] == max(BUDGETS))]
    own = {f"front_ms_{name}": round(rows["sampler_ms"].median(), 2) for name, rows in last.groupby("problem")}
    versions = {"optuna": optuna.__version__, "python": platform.python_version()}
    return {**shares, **own, **versions, "cpu": table["cpu"].iloc[-1], "date": table["date"].iloc[-1]}


def main(arguments: list[str]) -> None:
    """Measures unless told not to, and draws."""
    only_draw = arguments[:1] == ["draw"]
    file = DOCS / "bench.csv" if only_draw or not arguments else Path(arguments[0])
    if not only_draw:
        measure(file, int(arguments[1]) if len(arguments) > 1 else 1)
    table = pd.read_csv(file)
    draw(table)
    print(json.dumps(summary(table)))


if __name__ == "__main__":
    main(sys.argv[1:])
