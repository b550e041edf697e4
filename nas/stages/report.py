"""nas report: report.html and the figures of a search, or of a sweep of searches, from their CSVs."""

import json
import shlex
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import moocore
import pandas as pd

from nas import console
from nas.config import Report
from nas.errors import UserError
from nas.files import read_csv, write_atomically, write_csv
from nas.latency.accuracy import CHECK_COLUMNS
from nas.latency.predictor import Workload
from nas.metrics import LIMITS
from nas.ranking import TRAINED, order_sentence
from nas.report import front as figures
from nas.report.agreement import draw_check
from nas.report.figure import figure
from nas.report.learned import learned
from nas.report.page import draw_page
from nas.report.views import REFERENCE, Page, costs
from nas.run import FinishedRun, runs_in, start_run
from nas.search import Objectives, on_front, reference_point
from nas.search.exact import Floats
from nas.search.pareto import front_distance
from nas.space import SearchSpace, format_vector, searched_space

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
    known = [*parents.values()]
    _check_comparable(known)
    trained = None
    if config.trained:
        parents["trained"] = FinishedRun(Path(config.trained), "finetune")
        trained = _trained(parents["trained"], searches)
    resolved = {key: getattr(config, key) for key in ("run", "reference", "trained")}
    with start_run(path, "report", resolved, parents=parents) as run:
        _report(searches, known, trained, path)
        run.finish()
    console.print("Figures: " + ", ".join(str(file) for file in sorted(path.glob("*.png"))) + " (and .svg)")
    console.print(f"To explore in a browser: {path / 'report.html'}")


def _trained(finetuned: FinishedRun, searches: list[FinishedRun]) -> pd.DataFrame:
    """What `nas finetune` made of vectors of one of the searches."""
    if "export" not in finetuned.parents:
        raise UserError(f"trained={finetuned.path} trained one checkpoint=; give a run of nas finetune run=EXPORT_RUN")
    search = finetuned.parent("export").parent("search")
    if search.digest() not in [each.digest() for each in searches]:
        raise UserError(f"trained={finetuned.path} trained vectors of {search.path}; report that search")
    return read_csv(finetuned.artifact("front_trained.csv"), TRAINED)[TRAINED]


def _report(searches: list[FinishedRun], known: list[FinishedRun], trained: pd.DataFrame | None, path: Path) -> None:
    """Writes all files and prints what they show. The ``known`` searches begin with those to draw."""
    first = searches[0]
    objectives = Objectives(tuple(first.config["objectives"]))
    columns = ["vector", "loss_nats", "on_front", *objectives.names]
    known_trials = [read_csv(search.artifact("trials.csv"), columns) for search in known]
    trials, better = known_trials[: len(searches)], known_trials[len(searches) :]  # the latter are the reference's
    labels = _labels([search.config for search in searches])
    runs = list(zip(labels, trials, strict=True))
    space, name = searched_space(first.config)
    points, reference = _points(trials, space, objectives)
    if trained is not None:
        points = points.merge(trained, on="vector", how="left")
    best = moocore.filter_dominated(objectives.points(pd.concat(known_trials)), maximise=objectives.maximise)
    uniform = set(map(format_vector, space.uniform_vectors()))
    qualities = [front_metrics(run, uniform, objectives, best, reference) for run in trials]
    metrics = pd.DataFrame(qualities).assign(label=labels, run=[search.path.name for search in searches])
    write_csv(path / "metrics.csv", metrics)
    page = _page(searches, runs, better, points, metrics, reference)

    draw = partial(figure, caption=_caption(first.config))
    with draw(path / "front", f"{name}: Pareto front") as drawing:
        figures.draw_front(drawing, points, objectives, better)
    with draw(path / "groups", f"{name}: KV groups along the front") as drawing:
        figures.draw_groups(drawing, figures.group_matrix(page.front))
    with draw(path / "hypervolume", f"{name}: hypervolume by evaluations") as drawing:
        figures.draw_hypervolume(drawing, page.volumes, objectives, reference)
    if trained is not None:
        with draw(path / "front_trained", f"{name}: losses before and after training") as drawing:
            figures.draw_trained(drawing, points.dropna(subset=TRAINED), objectives)
    if len(page.check):
        with draw(path / "latency_check", f"{space.name}: predicted and measured models") as drawing:
            draw_check(drawing, page.check)

    html = draw_page(page, objectives)
    write_atomically(path / "report.html", lambda file: file.write_text(html, encoding="utf-8"))

    console.print(f"{name}; {page.caption}")
    console.print(figures.front_table(page.front, objectives))
    console.print(figures.gain_sentence(points, uniform))
    if trained is not None:
        console.print(order_sentence(trained))
    _print_metrics(metrics, alone=len(known) == 1)


def _page(
    searches: Sequence[FinishedRun],
    runs: Sequence[tuple[str, pd.DataFrame]],
    better: Sequence[pd.DataFrame],
    points: pd.DataFrame,
    metrics: pd.DataFrame,
    reference: Floats,
) -> Page:
    """What the page shows; ``runs`` are the searches' labels and trials."""
    first = searches[0]
    space, name = searched_space(first.config)
    objectives, names = Objectives(tuple(first.config["objectives"])), ["run", "label"]
    # The largest uniform vector's moves come first: they are the penalties of single layers.
    bases = [*points[points["uniform"]].sort_values("parameters", ascending=False)["vector"]]
    bases += points[points["on_front"] & ~points["uniform"]]["vector"].tolist()
    vectors, moves = learned(_who_and_when(points, searches, runs), space, bases)
    fronts = [figures.attained(runs, costs(vectors))]
    fronts += [figures.attained([(REFERENCE, one)], [cost for cost in costs(vectors) if cost in one]) for one in better]
    timed = (first.path / "latency_check.csv").is_file()
    return Page(
        title=f"{name}: loss against cost",
        caption=_caption(first.config) + (_stopped(first) if len(searches) == 1 else ""),
        vectors=vectors,
        moves=moves,
        levels=space.levels,
        fronts=pd.concat(fronts, ignore_index=True),
        limits={LIMITS[key].name: bound for key, bound in _limits(first.config).items()},
        volumes=figures.curves(runs, objectives, reference),
        reference=figures.reference_text(objectives, reference),
        check=read_csv(first.artifact("latency_check.csv"), CHECK_COLUMNS) if timed else pd.DataFrame(),
        runs=pd.concat([metrics[names], _differences(searches), metrics.drop(columns=names)], axis=1),
    )


def _points(trials: list[pd.DataFrame], space: SearchSpace, objectives: Objectives) -> tuple[pd.DataFrame, Floats]:
    """Every vector that the searches evaluated, with the front of all, and the hypervolume's reference point."""
    vectors = space.reference_vectors()
    everything = pd.concat(trials, join="inner").drop_duplicates("vector", ignore_index=True)
    points = figures.front_points(everything.assign(on_front=on_front(everything, objectives)), vectors)
    # Limits and small budgets leave some reference vectors out.
    complete = set(map(format_vector, vectors.values())) <= set(points["vector"])
    return points, reference_point(points[points["name"] != ""] if complete else points, objectives)


def _print_metrics(metrics: pd.DataFrame, alone: bool) -> None:
    """A line for each label; a search ``alone`` would be compared with itself."""
    for label, rows in metrics.groupby("label", sort=False):
        middle = rows.median(numeric_only=True)
        share = f"{middle['hypervolume_share']:.1%} of the best front's"
        beside = "" if alone else f", {share}, and distance {middle['distance']:.4f} from it"
        console.print(
            f"Sampler {label}: hypervolume {middle['hypervolume']:.6g}{beside}, "
            f"after {middle['evaluations']:.0f} evaluations "
            f"(median of {len(rows)}); {middle['uniform_on_front']:.0f} of {middle['on_front']:.0f} front vectors "
            "are uniform"
        )


def _who_and_when(
    points: pd.DataFrame, searches: Sequence[FinishedRun], runs: Sequence[tuple[str, pd.DataFrame]]
) -> pd.DataFrame:
    """The points with who evaluated each of them, when first and how often, and the command that exports it."""
    tables = [
        trials[["vector"]].assign(label=label, evaluation=range(1, len(trials) + 1), run=str(search.path))
        for search, (label, trials) in zip(searches, runs, strict=True)
    ]
    evaluated = pd.concat(tables).groupby("vector")
    found = evaluated.agg(label=("label", "first"), times=("run", "size"), evaluation=("evaluation", "min"))
    found["label"] = found["label"].where(evaluated["label"].nunique() == 1, "several")
    first = evaluated["run"].first().items()
    found["command"] = [shlex.join(["nas", "export", f"run={run}", f"select={vector}"]) for vector, run in first]
    return points.join(found, on="vector")


def _limits(config: dict[str, Any]) -> dict[str, float]:
    """The bounds of a recorded search by their keys in ``constraints``."""
    return {key: bound for key, bound in config.get("constraints", {}).items() if bound is not None}


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
    limits = [f"{key} {bound:g}" for key, bound in _limits(config).items()]
    within = [f"within {', '.join(limits)}"] if limits else []
    return "; ".join([*within, str(Workload(**config["workload"])), f"latency {config['latency'].partition(';')[0]}"])


def _stopped(search: FinishedRun) -> str:
    """Why a search ended before its budget did, where it says so."""
    if "metrics.jsonl" not in search.artifacts:
        return ""
    lines = map(json.loads, search.artifact("metrics.jsonl").read_text(encoding="utf-8").splitlines())
    stopped = [line["stopped"] for line in lines if "stopped" in line]
    return f"; stopped as {stopped[-1]}" if stopped else ""


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


def _differences(searches: Sequence[FinishedRun]) -> pd.DataFrame:
    """What differs between the configs of runs, a row each."""
    flat = pd.json_normalize([search.config for search in searches]).astype(str)
    return flat.loc[:, flat.nunique(dropna=False) > 1]
