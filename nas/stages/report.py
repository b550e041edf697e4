"""nas report: the figures of a search, or of a sweep of searches, from their CSVs."""

import textwrap
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd

from nas import console
from nas.config import Report
from nas.csv_files import read_csv
from nas.errors import UserError
from nas.files import write_atomically
from nas.latency.accuracy import CHECK_COLUMNS
from nas.latency.predictor import Workload
from nas.report.figure import figure
from nas.report.groups import draw_groups, group_matrix, groups_size
from nas.report.hypervolume import SearchCurve, curves, draw_hypervolume
from nas.report.predicted import check_size, draw_check
from nas.report.scatter import draw_front, front_points
from nas.report.terminal import front_table, gain_sentence
from nas.run import FinishedRun, is_run, runs_in, start_run
from nas.search import COLUMNS, Objectives, on_front, reference_point
from nas.search.pareto import front_distance, gains_over_uniform

_TITLE_WIDTH = 58
_COMPARABLE = ("space", "device", "workload", "objectives", "windows", "latency_table")


def run(config: Report, path: Path) -> None:
    """Draws into ``path``."""
    source = Path(config.run)
    if not source.is_dir():
        raise UserError(f"run={config.run} does not exist; give the directory of a search or of a sweep")
    folders = [source] if is_run(source) else runs_in(source)
    if not folders:
        raise UserError(f"{source} holds no run; give the directory of a search or of a sweep of searches")
    searches = [FinishedRun(folder, "search") for folder in folders]
    parents = {f"search_{index}": search for index, search in enumerate(searches)}
    others = []
    if config.reference:
        others.append(FinishedRun(Path(config.reference), "search"))
        parents["reference"] = others[0]
    _check_comparable([*searches, *others])
    with start_run(path, "report", {"run": config.run, "reference": config.reference}, parents=parents) as run:
        _draw(searches, others, path)
        run.finish()
    console.print("Figures: " + ", ".join(str(file) for file in sorted(path.glob("*.png"))) + " (and .svg)")


def _draw(searches: list[FinishedRun], others: list[FinishedRun], path: Path) -> None:
    """Draws the searches; the others only count for the best front known."""
    first = searches[0]
    objectives = Objectives(tuple(first.config["objectives"]))
    title = _title(first.config)
    trials = [read_csv(search.artifact("trials.csv"), COLUMNS) for search in searches]
    reference_vectors = read_csv(first.artifact("reference_vectors.csv"), ["name", "vector"])
    everything = pd.concat(trials).drop_duplicates("vector")
    everything["on_front"] = on_front(everything, objectives)
    points = front_points(everything, reference_vectors)
    front = points[points["on_front"]].sort_values("loss_nats")

    panels = len(objectives.names) * (len(objectives.names) - 1) // 2
    with figure(path / "front", width=6.4 if panels == 1 else 4.6 * panels) as drawing:
        draw_front(drawing, points, objectives, title)
    groups = group_matrix(front)
    with figure(path / "groups", **groups_size(groups)) as drawing:
        draw_groups(drawing, groups, title)

    known = everything[everything["vector"].isin(reference_vectors["vector"])]
    complete = len(known) == reference_vectors["vector"].nunique()  # limits and small budgets leave some out
    reference = reference_point(known if complete else everything, objectives)
    labels = _labels([search.config for search in searches])
    table = curves([SearchCurve(*pair) for pair in zip(labels, trials, strict=True)], objectives, reference)
    with figure(path / "hypervolume") as drawing:
        draw_hypervolume(drawing, table, objectives, reference, title)

    if (first.path / "latency_check.csv").is_file():
        check = read_csv(first.artifact("latency_check.csv"), CHECK_COLUMNS)
        if not check.empty:
            with figure(path / "latency_check", **check_size(check)) as drawing:
                draw_check(drawing, check, title)

    console.print(front_table(front, dict(zip(reference_vectors["vector"], reference_vectors["name"], strict=True))))
    uniform = reference_vectors.loc[reference_vectors["name"].str.startswith("uniform "), "vector"].tolist()
    console.print(gain_sentence(gains_over_uniform(everything, uniform)))
    known_trials = [everything, *(read_csv(search.artifact("trials.csv"), COLUMNS) for search in others)]
    best = moocore.filter_dominated(objectives.points(pd.concat(known_trials)), maximise=objectives.maximise)
    rows = [front_metrics(run, uniform, objectives, best, reference) for run in trials]
    metrics = pd.DataFrame(rows).assign(label=labels, run=[search.path.name for search in searches])
    write_atomically(path / "metrics.csv", partial(metrics.to_csv, index=False))
    for label, of_label in metrics.groupby("label", sort=False):
        middle = of_label.median(numeric_only=True)
        beside = (
            f", {middle['hypervolume_share']:.1%} of the best front's, and distance {middle['distance']:.4f} from it"
            if len(searches) + len(others) > 1  # alone it would be compared with itself
            else ""
        )
        console.print(
            f"{label}: hypervolume {middle['hypervolume']:.6g}{beside}, after {middle['evaluations']:.0f} evaluations "
            f"(median of {len(of_label)}); {middle['uniform_on_front']:.0f} of {middle['on_front']:.0f} front vectors "
            "are uniform"
        )


def front_metrics(
    trials: pd.DataFrame,
    uniform: Collection[str],
    objectives: Objectives,
    best: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64],
) -> dict[str, float]:
    """How good the front of one search is beside the best one known, whose points are ``best``."""
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


def _title(config: dict[str, Any]) -> str:
    limits = [f"{key} {limit:g}" for key, limit in config.get("constraints", {}).items() if limit is not None]
    lines = [f"{config['space']['name']}: {Workload(**config['workload'])}", f"latency {config['latency']}"]
    lines += [f"within {', '.join(limits)}"] if limits else []
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _TITLE_WIDTH))


def _check_comparable(searches: list[FinishedRun]) -> None:
    def facts(search: FinishedRun) -> dict[str, Any]:
        return {key: search.config.get(key) for key in _COMPARABLE} | {
            "supernet": search.info["parents"]["supernet"]["hash"]
        }

    first = facts(searches[0])
    for search in searches[1:]:
        if different := [key for key, value in facts(search).items() if value != first[key]]:
            raise UserError(
                f"{search.path} and {searches[0].path} differ in {different[0]} and cannot be compared; report each "
                "alone"
            )


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
