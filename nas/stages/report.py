"""nas report: the figures of a search, or of a sweep of searches, from their CSVs."""

import shlex
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd

from nas import console
from nas.config import Report
from nas.errors import UserError
from nas.files import read_csv, write_atomically, write_csv
from nas.latency.accuracy import CHECK_COLUMNS
from nas.latency.predictor import Workload
from nas.metrics import LIMITS
from nas.report.figure import figure
from nas.report.front import attained, draw_front, draw_groups, front_points, front_table, gain_sentence, group_matrix
from nas.report.hypervolume import curves, draw_hypervolume, reference_text
from nas.report.learned import learned
from nas.report.page import Page, costs, draw_page
from nas.report.predicted import draw_check
from nas.run import FinishedRun, runs_in, start_run
from nas.search import Objectives, on_front, reference_point
from nas.search.pareto import front_distance
from nas.space import format_vector, searched_space

Floats = npt.NDArray[np.float64]
_COMPARABLE = ("space", "serve", "device", "workload", "objectives", "windows", "latency_table")


def run(config: Report, path: Path) -> None:
    """Draws into ``path``."""
    source = Path(config.run)
    searches = [FinishedRun(folder, "search") for folder in runs_in(source)]
    if not searches:
        raise UserError(f"{source} does not exist or holds no run; give the directory of a search or of a sweep")
    parents = {f"search_{index}": search for index, search in enumerate(searches)}
    if config.reference:
        parents["reference"] = FinishedRun(Path(config.reference), "search")
    _check_comparable([*parents.values()])
    with start_run(path, "report", {"run": config.run, "reference": config.reference}, parents=parents) as run:
        _draw(searches, [*parents.values()], path)
        run.finish()
    console.print("Figures: " + ", ".join(str(file) for file in sorted(path.glob("*.png"))) + " (and .svg)")


def _draw(searches: list[FinishedRun], known: list[FinishedRun], path: Path) -> None:
    """Draws the searches. The ``known`` ones, which begin with them, make the best known front."""
    first = searches[0]
    objectives = Objectives(tuple(first.config["objectives"]))
    columns = ["vector", "loss_nats", "on_front", *objectives.names]
    known_trials = [read_csv(search.artifact("trials.csv"), columns) for search in known]
    trials = known_trials[: len(searches)]
    space, name = searched_space(first.config)
    reference_vectors, caption = space.reference_vectors(), _caption(first.config)
    everything = pd.concat(trials).drop_duplicates("vector", ignore_index=True)
    everything["on_front"] = on_front(everything, objectives)
    points = front_points(everything, reference_vectors)
    front = points[points["on_front"]].sort_values("loss_nats")
    draw = partial(figure, caption=caption)
    labels = _labels([search.config for search in searches])
    runs = list(zip(labels, trials, strict=True))

    with draw(path / "front", f"{name}: Pareto front") as drawing:
        draw_front(drawing, points, objectives)
    with draw(path / "groups", f"{name}: KV groups along the front") as drawing:
        draw_groups(drawing, group_matrix(front))

    # Limits and small budgets leave some reference vectors out.
    complete = set(map(format_vector, reference_vectors.values())) <= set(everything["vector"])
    reference = reference_point(points[points["name"] != ""] if complete else points, objectives)
    table = curves(runs, objectives, reference)
    with draw(path / "hypervolume", f"{name}: hypervolume by evaluations") as drawing:
        draw_hypervolume(drawing, table, objectives, reference)

    timed = (first.path / "latency_check.csv").is_file()
    check = read_csv(first.artifact("latency_check.csv"), CHECK_COLUMNS) if timed else pd.DataFrame()
    if len(check):
        with draw(path / "latency_check", f"{space.name}: predicted and measured models") as drawing:
            draw_check(drawing, check)

    console.print(f"{name}; {caption}")
    console.print(front_table(front, objectives))
    uniform = set(map(format_vector, space.uniform_vectors()))
    console.print(gain_sentence(everything, uniform))
    best = moocore.filter_dominated(objectives.points(pd.concat(known_trials)), maximise=objectives.maximise)
    rows = [front_metrics(run, uniform, objectives, best, reference) for run in trials]
    metrics = pd.DataFrame(rows).assign(label=labels, run=[search.path.name for search in searches])
    write_csv(path / "metrics.csv", metrics)
    vectors, moves = learned(points.assign(**_finders(points, searches, runs)), space, _bases(points))
    if len(runs) == 1:
        vectors["hypervolume"] = table["median"]
    limits = {LIMITS[key].name: bound for key, bound in first.config["constraints"].items() if bound is not None}
    page = Page(
        f"{name}: loss against cost",
        caption,
        vectors,
        cost=next(metric for metric in [*objectives.names, *costs(vectors)] if metric in costs(vectors)),
        fronts=attained(runs, costs(vectors)),
        volumes=table,
        reference=reference_text(objectives, reference),
        limits=limits,
        levels=sorted({groups for allowed in space.choices for groups in allowed}),
        moves=moves,
        check=check,
        runs=metrics.set_index("run").join(_differences(searches)) if len(runs) > 1 else pd.DataFrame(),
    )
    html = draw_page(page)
    write_atomically(path / "report.html", lambda file: file.write_text(html, encoding="utf-8"))
    alone = len(known) == 1  # and would be compared with itself
    for label, runs in metrics.groupby("label", sort=False):
        middle = runs.median(numeric_only=True)
        share = f"{middle['hypervolume_share']:.1%} of the best front's"
        beside = "" if alone else f", {share}, and distance {middle['distance']:.4f} from it"
        console.print(
            f"{label}: hypervolume {middle['hypervolume']:.6g}{beside}, after {middle['evaluations']:.0f} evaluations "
            f"(median of {len(runs)}); {middle['uniform_on_front']:.0f} of {middle['on_front']:.0f} front vectors "
            "are uniform"
        )


def _finders(
    points: pd.DataFrame, searches: Sequence[FinishedRun], runs: Sequence[tuple[str, pd.DataFrame]]
) -> dict[str, pd.Series]:
    """Of each vector: the group of runs that evaluated it, when that was, and the command that exports it."""
    label, evaluation, command = {}, {}, {}
    for search, (of, trials) in zip(searches, runs, strict=True):
        for number, vector in enumerate(trials["vector"], start=1):
            label[vector] = of if label.get(vector, of) == of else "several"
            evaluation[vector] = min(number, evaluation.get(vector, number))
            command.setdefault(vector, shlex.join(["nas", "export", f"run={search.path}", f"select={vector}"]))
    vectors = points["vector"]
    return {name: vectors.map(of) for name, of in (("label", label), ("evaluation", evaluation), ("command", command))}


def _bases(points: pd.DataFrame) -> list[str]:
    """The vectors whose moves are shown: the largest evaluated one first, the other uniform ones, then the front."""
    uniform = points[points["uniform"]].sort_values("parameters", ascending=False)
    return list(dict.fromkeys([*uniform["vector"], *points[points["on_front"]]["vector"]]))


def front_metrics(
    trials: pd.DataFrame, uniform: Collection[str], objectives: Objectives, best: Floats, reference: Floats
) -> dict[str, float]:
    """How good the front of one search is beside the points of the best known front."""
    points, front = objectives.points(trials), trials[trials["on_front"]]
    found, most = (moocore.hypervolume(some, ref=reference, maximise=objectives.maximise) for some in (points, best))
    return {
        "evaluations": len(trials),
        "hypervolume": found,
        "hypervolume_share": found / most,
        "distance": front_distance(points, best, objectives),
        "on_front": len(front),
        "uniform_on_front": int(front["vector"].isin(uniform).sum()),
    }


def _caption(config: dict[str, Any]) -> str:
    """Workload, source of the latency (its first clause; run.json has the rest) and limits, in one line."""
    limits = [f"{key} {limit:g}" for key, limit in config.get("constraints", {}).items() if limit is not None]
    within = [f"within {', '.join(limits)}"] if limits else []
    return "; ".join([*within, str(Workload(**config["workload"])), f"latency {config['latency'].partition(';')[0]}"])


def _check_comparable(searches: list[FinishedRun]) -> None:
    first, *others = searches
    for search in others:
        different = [key for key in _COMPARABLE if search.config.get(key) != first.config.get(key)]
        if search.parents["supernet"]["hash"] != first.parents["supernet"]["hash"]:
            different.append("supernet")
        if different:
            raise UserError(f"{search.path} and {first.path} differ in {different[0]}; report each alone")


def _labels(configs: list[dict[str, Any]]) -> list[str]:
    """What sets each run apart, seeds aside: its sampler, and any key that varies among the runs of that sampler."""
    flat = [pd.json_normalize(config).drop(columns="seed").to_dict("records")[0] for config in configs]
    labels = []
    for values in flat:
        alike = [other for other in flat if other["sampler._target_"] == values["sampler._target_"]]
        varied = [key for key in values if len({str(other.get(key)) for other in alike}) > 1]
        sampler = values["sampler._target_"].rsplit(".", 1)[-1].removesuffix("Sampler")
        labels.append(", ".join([sampler, *(f"{key} {values[key]}" for key in varied)]))
    return labels


def _differences(searches: list[FinishedRun]) -> pd.DataFrame:
    """What differs between the configs of runs, by run."""
    flat = pd.json_normalize([search.config for search in searches]).astype(str)
    flat.index = pd.Index([search.path.name for search in searches], name="run")
    return flat.loc[:, flat.nunique() > 1]
