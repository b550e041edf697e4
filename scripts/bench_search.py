"""How much of the exact front's hypervolume each sampler finds, by evaluations.

Problems of 32 layers, drawn anew for each seed, whose exact fronts are known. What `front` assumes:

    additive     penalties of layers that add up, fewer groups being worse
    adjacent     the same, with couplings of neighbouring layers

and what it does not:

    saturating   a sum as in `additive`, behind 1 - exp(-x)
    exploding    the same behind a cube
    distant      couplings as in `adjacent`, but of layers in a hidden order
    together     hidden blocks of four layers that matter only together
    signed       penalties that may favour fewer groups
    noisy        `additive`, with noise as large as half a layer's mean penalty; judged by the true losses

and `real`: the losses of all 6,561 vectors of a trained supernet of `tiny` (docs/search/tiny_losses.csv; docs/search.md
says how it came to be). `near` is the same judged by the reference point of `nas report`: real losses lie so near each
other that in the hypervolume of `real`, 5 % beyond the worst uniform vector, even random vectors cover nearly all.

None but `one-at-a-time` is told the costs. Every search evaluates the uniform vectors first, and no vector twice.
`-int` samplers see the layers as whole numbers, the others as categories. `one-at-a-time` changes one layer at a time,
adds the differences up, and evaluates the exact front of that sum. Searches that are in the CSV already are not made
again. The last line of stdout is JSON: median shares of `front`, and the milliseconds of its own that each sampler
takes per trial.

    python scripts/bench_search.py docs/search/bench.csv --workers 16     the searches that it lacks, then as below
    python scripts/bench_search.py docs/search/bench.csv --draw           bench.png, table.md, the table of search.md
    python scripts/bench_search.py docs/search/auto.csv --auto --seeds 5  where budget=auto stops
"""

import functools
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import moocore
import numpy as np
import optuna
import pandas as pd
from matplotlib.ticker import PercentFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from shared import add_rows, argument_parser, markdown_table

from nas.files import write_atomically, write_csv
from nas.hardware import cpu_name
from nas.report.figure import COLOURS, figure
from nas.run import git_state, now, origin
from nas.search import Objectives, reference_point
from nas.search.exact import Floats, Ints, best_by_counts, best_by_weights
from nas.search.front_sampler import FrontSampler
from nas.search.loss_model import LayerLosses
from nas.search.sampler import has_converged
from nas.space import SearchSpace, load_space, parse_vector

DOCS = Path(__file__).resolve().parent.parent / "docs" / "search"
PROBLEMS = ("additive", "adjacent", "saturating", "exploding", "distant", "together", "signed", "noisy", "real")
BUDGETS, SEEDS = (50, 100, 200, 500), range(10)
GROUPS = np.array([1, 2, 4])
PENALTY = 0.02  # a layer's mean penalty from four groups to one


@dataclass(frozen=True)
class Problem:
    """Losses of vectors, and the front that can be reached.

    Attributes:
        space: The search space.
        true: Losses of vectors of choices, (N, L) to (N,).
        front: Loss and cost of the exact front's points.
        noise: Standard deviation of what is added to each loss that a sampler sees.
    """

    space: SearchSpace
    true: Callable[[Ints], Floats]
    front: Floats
    noise: float = 0.0

    def references(self, name: str) -> dict[str, Floats]:
        """The hypervolume's reference points: one, for ``real`` also a near one, by the name of the panel."""
        uniform = np.array(self.space.uniform_vectors())
        columns = {"loss_nats": self.true(np.searchsorted(GROUPS, uniform)), "decode_ms": costs_of(uniform)}
        far = {name: 1.05 * np.array([values.max() for values in columns.values()])}
        near = {"near": reference_point(pd.DataFrame(columns), Objectives(tuple(columns)))}
        return far | near if name == "real" else far

    def share(self, vectors_NL: Ints, seen_N: Floats, reference: Floats) -> float:
        """What evaluated vectors of groups have of the exact front's hypervolume; if noisy, those that seem best."""
        points = np.column_stack((seen_N, costs_of(vectors_NL)))
        points = points[best := moocore.is_nondominated(points)]
        points[:, 0] = self.true(np.searchsorted(GROUPS, vectors_NL[best]))
        return float(moocore.hypervolume(points, ref=reference) / moocore.hypervolume(self.front, ref=reference))


def costs_of(vectors_NL: Ints) -> Floats:
    """Milliseconds of a decode step, shape (N,)."""
    return np.asarray(7.389 + 0.0214 * (vectors_NL == 2).sum(axis=1) + 0.068 * (vectors_NL == 4).sum(axis=1))


@functools.lru_cache(maxsize=4)
def problem(name: str, seed: int) -> Problem:
    """A problem; all but `real` are drawn from the seed."""
    if name == "real":
        table = pd.read_csv(DOCS / "tiny_losses.csv")
        vectors = np.searchsorted(GROUPS, [parse_vector(vector) for vector in table["vector"]])
        losses = dict(zip(map(tuple, vectors.tolist()), table["loss_nats"], strict=True))
        return Problem(
            load_space("tiny"),
            lambda some: np.array([losses[tuple(vector)] for vector in some.tolist()]),
            nondominated(table["loss_nats"].to_numpy(), vectors),
        )
    space, rng = load_space("decilm-6b"), np.random.default_rng(seed)
    layers = space.shape.num_hidden_layers
    if name == "together":
        return blocks(space, rng)
    ones = rng.gamma(2.0, PENALTY / 2, layers)
    penalties = np.stack((ones, ones * rng.uniform(0.3, 0.7, layers), np.zeros(layers)), axis=1)
    coupled = name in ("adjacent", "distant")
    couplings = rng.normal(0.0, PENALTY / 4, (layers - 1, 3, 3)) * coupled
    order = rng.permutation(layers) if name == "distant" else np.arange(layers)
    if name == "signed":
        penalties += rng.normal(0.0, PENALTY / 2, penalties.shape)
    total = ones.sum()
    link: Callable[[Floats], Floats] = {
        "saturating": lambda sums: total / 2 * (1 - np.exp(-sums / (total / 5))),
        "exploding": lambda sums: total * ((sums / total + 0.3) / 1.3) ** 3,
    }.get(name, lambda sums: sums)
    truth, best = LayerLosses(0.0, penalties, couplings), best_by_counts(penalties, couplings)
    return Problem(
        space,
        lambda vectors: link(truth.of(vectors[:, order])),
        nondominated(link(best.losses_T), best.vectors_TL),
        noise=PENALTY / 2 if name == "noisy" else 0.0,
    )


def blocks(space: SearchSpace, rng: np.random.Generator) -> Problem:
    """Blocks of four layers, of which the cheap ones cost little until their weighted number passes a threshold."""
    members = rng.permutation(space.shape.num_hidden_layers).reshape(-1, 4)
    states = np.array(list(itertools.product(range(3), repeat=4)))
    saved = (2 - states) / 2
    tables = []
    for _ in members:
        weighted = saved @ rng.dirichlet(np.full(4, 2.0))
        tables.append(rng.gamma(2.0, 2 * PENALTY) * (0.15 * weighted + np.maximum(1.5 * weighted - 0.5, 0)))
    losses_BS, place = np.array(tables), 3 ** np.arange(3, -1, -1)
    weights = np.stack(((states == 1).sum(axis=1), (states == 2).sum(axis=1)), axis=1)
    best = best_by_weights(losses_BS, None, weights)
    vectors = np.empty((len(best.losses_T), members.size), dtype=np.intp)
    vectors[:, members] = states[best.vectors_TL]

    def true(some: Ints) -> Floats:
        return np.asarray(losses_BS[np.arange(len(members)), some[:, members] @ place].sum(axis=1))

    return Problem(space, true, nondominated(true(vectors), vectors))


def nondominated(losses_N: Floats, vectors_NL: Ints) -> Floats:
    """Loss and cost of the best of some vectors of choices."""
    points = np.column_stack((losses_N, costs_of(GROUPS[vectors_NL])))
    return np.asarray(points[moocore.is_nondominated(points)])


class OneAtATime(optuna.samplers.BaseSampler):
    """Each layer alone with each smaller choice, others at the largest; then the front of the sum of what that changed.

    The points of that front are taken in an order that halves the largest gap between their costs each time.
    """

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        done = {tuple(one.params.values()): one.values[0] for one in finished}
        layers, largest = len(search_space), (4,) * len(search_space)
        if not layers:
            return {}
        single = {
            (layer, choice): (*largest[:layer], groups, *largest[layer + 1 :])
            for layer in range(layers)
            for choice, groups in enumerate(GROUPS[:-1].tolist())
        }
        for vector in single.values():
            if vector not in done:
                return dict(zip(search_space, vector, strict=True))
        penalties = np.zeros((layers, len(GROUPS)))
        for place, vector in single.items():
            penalties[place] = done[vector] - done[largest]
        best = best_by_counts(penalties)
        vectors, costs = GROUPS[best.vectors_TL], costs_of(GROUPS[best.vectors_TL])
        on_front = moocore.is_nondominated(np.column_stack((best.losses_T, costs)))
        known = np.array([tuple(vector) in done for vector in vectors.tolist()])
        gaps = np.abs(costs[:, None] - costs[on_front & known]).min(axis=1, initial=np.inf)
        place = np.lexsort((-gaps, ~on_front, known))[0]  # new ones first, of these the front's, of these the loneliest
        return dict(zip(search_space, vectors[place].tolist(), strict=True))

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return 4


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "front": lambda seed: FrontSampler(seed=seed),
    "one-at-a-time": lambda _: OneAtATime(),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "tpe-int": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "tpe-multivariate": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "nsga2-int": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=20),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "gp-int": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
DRAWN = ("front", "one-at-a-time", "gp-int", "tpe-multivariate", "nsga2", "random")  # others are in the table
# Evaluations of samplers that take long: GP seconds per trial, univariate TPE minutes for the last hundred of 500.
LIMITED = {"gp": 100, "gp-int": 100, "tpe": 200, "tpe-int": 200}


class Step(NamedTuple):
    """A search after one more evaluation."""

    vectors_NL: Ints  # of groups
    seen_N: Floats
    seconds: float  # that the sampler took for the last proposal


def steps(name: str, sampler: optuna.samplers.BaseSampler, whole: bool, seed: int) -> Iterator[Step]:
    """A search without end, step by step; ``whole``: layers are whole numbers to the sampler."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    task, noise = problem(name, seed), np.random.default_rng([seed, 1])
    layers = [f"layer_{layer:02d}" for layer in range(task.space.shape.num_hidden_layers)]
    groups_of = dict(zip(range(3) if whole else GROUPS.tolist(), GROUPS.tolist(), strict=True))  # by parameter's value
    distribution = IntDistribution(0, 2) if whole else CategoricalDistribution(list(groups_of))
    distributions: dict[str, BaseDistribution] = dict.fromkeys(layers, distribution)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for value in groups_of:
        study.enqueue_trial(dict.fromkeys(layers, value))  # the uniform vectors
    vectors: list[tuple[int, ...]] = []
    seen: list[float] = []
    for count in itertools.count(1):
        begin = time.perf_counter()
        trial, vector = distinct(study, distributions, groups_of, vectors, np.random.default_rng([seed, count]))
        seconds = time.perf_counter() - begin
        loss = float(task.true(np.searchsorted(GROUPS, [vector]))[0] + task.noise * noise.normal())
        vectors.append(vector)
        seen.append(loss)
        study.tell(trial, (loss, float(costs_of(np.array([vector]))[0])))
        yield Step(np.array(vectors), np.array(seen), seconds)


def searched(name: str, sampler: str, seed: int) -> list[dict[str, Any]]:
    """One search: its share of the hypervolume after each budget, and the sampler's own time per trial so far."""
    task, rows, seconds = problem(name, seed), [], []
    search = steps(name, SAMPLERS[sampler](seed), sampler.endswith("-int"), seed)
    for count, step in enumerate(itertools.islice(search, LIMITED.get(sampler, max(BUDGETS))), start=1):
        seconds.append(step.seconds)
        for panel, reference in task.references(name).items() if count in BUDGETS else ():
            row = {"problem": panel, "sampler": sampler, "seed": seed, "evaluations": count}
            row["share"] = task.share(step.vectors_NL, step.seen_N, reference)
            rows.append(row | {"sampler_ms": 1e3 * statistics.median(seconds)})
    return rows


def stopped(name: str, seed: int) -> list[dict[str, Any]]:
    """A search by `front` with budget=auto: how many evaluations it takes, and what share it has found by then."""
    task, sampler = problem(name, seed), FrontSampler(seed=seed)
    promised: list[float | None] = []
    for step in itertools.islice(steps(name, sampler, False, seed), max(BUDGETS)):
        vectors, seen = step.vectors_NL, step.seen_N
        promised.append(sampler.promised)
        sampler.promised = None  # vectors that are evaluated first are nobody's proposals
        if has_converged(promised):
            break
    shares = {panel: task.share(vectors, seen, point) for panel, point in task.references(name).items()}
    found = {"seed": seed, "evaluations": len(promised), "converged": has_converged(promised)}
    return [{"problem": panel, **found, "share": share} for panel, share in shares.items()]


def distinct(
    study: optuna.Study,
    distributions: dict[str, BaseDistribution],
    groups_of: Mapping[int, int],
    known: Sequence[tuple[int, ...]],
    rng: np.random.Generator,
) -> tuple[optuna.Trial, tuple[int, ...]]:
    """A trial whose vector is new: the sampler's, or if it proposes nothing new 20 times, a random one."""
    for attempt in itertools.count():
        if attempt >= 20:
            study.enqueue_trial({name: rng.choice(list(groups_of)).item() for name in distributions})
        trial = study.ask(distributions)
        vector = tuple(groups_of[value] for value in trial.params.values())
        if vector not in known:
            return trial, vector
        study.tell(trial, state=TrialState.FAIL)
    raise AssertionError


def measure_stops(file: Path, seeds: int) -> None:
    """Makes the searches with budget=auto, and prints their table, as docs/search.md has it."""
    rows = [row | origin() for name, seed in itertools.product(PROBLEMS, range(seeds)) for row in stopped(name, seed)]
    table = pd.DataFrame(rows)
    write_csv(file, table)
    print(stops_table(table))


def stops_table(table: pd.DataFrame) -> str:
    """Median and range of evaluations and shares by problem."""
    lines = []
    for name, searches in table.groupby("problem", sort=False):
        cells = []
        for column, factor, digits in (("evaluations", 1, 0), ("share", 100, 2)):
            least, middle, most = (factor * searches[column].quantile(at) for at in (0.0, 0.5, 1.0))
            cells.append(f"{middle:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})")
        lines.append([f"`{name}`", *cells])
    return markdown_table(["problem", "evaluations", "share of the exact front in %"], lines)


def measure(file: Path, seeds: int, workers: int) -> None:
    """Makes the searches that the CSV lacks, the first seeds first."""
    known = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["problem", "sampler", "seed"])
    done = set(zip(known["problem"], known["sampler"], known["seed"], strict=True))
    everything = ((name, sampler, seed) for seed, name, sampler in itertools.product(range(seeds), PROBLEMS, SAMPLERS))
    commit = (git_state() or {}).get("commit")
    made = {"cpu": cpu_name(), "optuna": optuna.__version__, "commit": commit, "date": now()}
    with ProcessPoolExecutor(workers) as pool:
        searches = [pool.submit(searched, *search) for search in everything if search not in done]
        for search in as_completed(searches):
            found = search.result()
            add_rows(file, *(row | made for row in found))
            shares = [round(row["share"], 4) for row in found]
            print(*(found[0][key] for key in ("problem", "sampler", "seed")), shares, flush=True)


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """The rows by problem, evaluations and seed."""
    places = {name: place for place, name in enumerate((*PROBLEMS, "near"))}
    return table.assign(place=table["problem"].map(places)).sort_values(["place", "evaluations", "seed"])


def draw(table: pd.DataFrame, file: Path) -> None:
    """One panel per problem: median and quartiles of the share by evaluations, for the best sampler of each kind."""
    shown = [name for name in (*PROBLEMS, "near") if name in set(table["problem"])]
    with figure(file.with_suffix(""), width=12.6, height=6.4) as drawing:
        for axes, name in zip(drawing.subplots(2, -(-len(shown) // 2)).flat, shown, strict=False):
            for sampler, colour in zip(DRAWN, COLOURS, strict=False):
                rows = table[(table["problem"] == name) & (table["sampler"] == sampler)]
                shares = rows.groupby("evaluations")["share"]
                low, middle, high = (shares.quantile(quantile) for quantile in (0.25, 0.5, 0.75))
                axes.plot(middle.index, middle, marker="o", markersize=3, color=colour, label=sampler)
                axes.fill_between(middle.index, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(title=name, xlabel="evaluated vectors", xscale="log")
            axes.set_xticks(BUDGETS, map(str, BUDGETS))
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        drawing.axes[0].set_ylabel("share of the exact front's hypervolume")
        drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(DRAWN))


def quartiles(rows: pd.DataFrame) -> str:
    """Median and quartiles of shares, in per cent."""
    low, middle, high = 100 * rows["share"].quantile(np.array([0.25, 0.5, 0.75]))
    seeds = f", {len(rows)} seed{'s' * (len(rows) > 1)}" if len(rows) < len(SEEDS) else ""
    return f"{middle:.2f} ({low:.2f}–{high:.2f}{seeds})" if len(rows) else "–"


def full_table(table: pd.DataFrame) -> str:
    """All searches, as docs/search/table.md has them."""
    lines = [
        [*place, *(quartiles(rows[rows["sampler"] == sampler]) for sampler in SAMPLERS)]
        for place, rows in table.groupby(["problem", "evaluations"], sort=False)
    ]
    return markdown_table(["problem", "evaluations", *SAMPLERS], lines)


def short_table(table: pd.DataFrame) -> str:
    """Medians of `front` and of the best other sampler, as docs/search.md has them."""
    lines = []
    medians = 100 * table.groupby(["problem", "evaluations", "sampler"])["share"].median().unstack()
    for name in table["problem"].unique():
        rows = medians.loc[name].loc[list(BUDGETS)]
        others = rows.drop(columns="front")
        cells = zip(rows["front"], others.max(axis=1), others.idxmax(axis=1), strict=True)
        lines.append([f"`{name}`", *(f"{ours:.2f} / {best:.2f} {who}" for ours, best, who in cells)])
    return markdown_table(["after", *map(str, BUDGETS)], lines)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Median shares of `front`, and each sampler's own time per trial over all problems of 32 layers."""
    medians = table[table["sampler"] == "front"].groupby(["problem", "evaluations"], as_index=False)["share"].median()
    large = table[~table["problem"].isin(("real", "near"))]
    longest = large[large["evaluations"] == large.groupby("sampler")["evaluations"].transform("max")]
    milliseconds = longest.groupby("sampler")["sampler_ms"].median()
    shares = {"_".join(map(str, row[:2])): round(row[2], 4) for row in medians.itertuples(index=False)}
    return shares | {f"{name}_ms": round(took, 2) for name, took in milliseconds.items()}


def main() -> None:
    """Measures unless told not to, and draws."""
    parser = argument_parser(__doc__)
    parser.add_argument("csv", type=Path, help="table of searches, made or continued")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="searches of each problem and sampler")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--auto", action="store_true", help="only searches with budget=auto, into this CSV")
    parser.add_argument("--draw", action="store_true", help="no searches: only figure, table and summary of the CSV")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.auto:
        measure_stops(given.csv, given.seeds)
        return
    if not given.draw:
        measure(given.csv, given.seeds, given.workers)
    table = ordered(pd.read_csv(given.csv))
    draw(table, given.csv)
    what = "# All samplers\n\nShare of the exact front's hypervolume in per cent: median (quartiles) of 10 seeds."
    full = f"{what}\n\n{full_table(table)}\n"
    write_atomically(given.csv.with_name("table.md"), lambda path: path.write_text(full, encoding="utf-8"))
    print(short_table(table))
    print(json.dumps(summary(table)))


if __name__ == "__main__":
    main()
