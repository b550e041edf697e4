"""Reports: what the figures show, and that they come from the CSVs alone."""

import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pandas as pd
import pytest
from bokeh.document import Document
from bokeh.models import GlyphRenderer, Step
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from nas.latency.accuracy import CHECK_COLUMNS
from nas.metrics import METRICS
from nas.report.agreement import draw_check
from nas.report.figure import figure
from nas.report.front import (
    curves,
    draw_front,
    draw_groups,
    draw_hypervolume,
    front_points,
    front_table,
    gain_sentence,
    group_matrix,
)
from nas.search import Objectives
from nas.search.pareto import front_distance
from nas.stages.report import _labels
from tests.conftest import Nas, Workspace

TWO = Objectives(("loss_nats", "tokens_per_s"))
FIGURES = ("front", "groups", "hypervolume", "latency_check")


def assert_drawn(folder: Path) -> None:
    for name in FIGURES:
        assert Image.open(folder / f"{name}.png").width > 500
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")


def test_a_report_draws_every_figure_and_prints_the_front(nas: Nas, workspace: Workspace) -> None:
    result = nas("report", f"run={workspace.runs}/search/base", "name=base")
    assert result.code == 0, result.err
    assert_drawn(workspace.runs / "report" / "base")
    front = pd.read_csv(workspace.runs / "search" / "base" / "front.csv")
    for vector in front["vector"]:
        assert vector in result.out


def test_a_sweep_is_compared_by_sampler_with_the_spread_over_seeds(nas: Nas, workspace: Workspace) -> None:
    swept = ("-m", "sampler=nsga2,tpe", "seed=0,1", "--budget", "8")
    result = nas("search", *swept, "name=sweep", *workspace.arguments)
    assert result.code == 0, result.err
    folders = {path.parent.name for path in (workspace.runs / "search" / "sweep").glob("*/complete.json")}
    assert folders == {f"sampler-{sampler}_seed-{seed}" for sampler in ("nsga2", "tpe") for seed in (0, 1)}
    report = nas("report", f"run={workspace.runs}/search/sweep", "name=sweep")
    assert report.code == 0, report.err
    assert "NSGAII: hypervolume" in report.out
    assert len(pd.read_csv(workspace.runs / "report" / "sweep" / "metrics.csv")) == 4
    assert "TPE: hypervolume" in report.out
    assert "after 8 evaluations (median of 2); " in report.out
    assert_drawn(workspace.runs / "report" / "sweep")
    # A sweep that is repeated goes on with what is left.
    again = nas("search", *swept, "name=sweep", *workspace.arguments)
    assert again.code == 0, again.err
    assert again.err.count("already finished") == 4


def test_searches_are_measured_by_a_better_one(nas: Nas, workspace: Workspace) -> None:
    whole = nas("search", "--budget", "27", "sampler=random", "name=whole", *workspace.arguments)
    assert whole.code == 0, whole.err
    report = nas("report", "run=runs/search/base", "reference=runs/search/whole", "name=measured")
    assert report.code == 0, report.err
    metrics = pd.read_csv("runs/report/measured/metrics.csv").iloc[0]
    trials = pd.read_csv("runs/search/base/trials.csv")
    assert metrics["evaluations"] == len(trials) == 9
    assert metrics["on_front"] == trials["on_front"].sum()
    assert metrics["uniform_on_front"] == trials[trials["on_front"]]["vector"].isin(["1-1-1", "2-2-2", "4-4-4"]).sum()
    assert 0 < metrics["hypervolume_share"] <= 1
    assert metrics["distance"] >= 0
    html = Path("runs/report/measured/report.html").read_text()
    assert "Dotted: the reference search." in html
    (stored,) = re.findall(r'<script type="application/json".*?>(.*?)</script>', html, re.DOTALL)
    page = Document.from_json(next(iter(json.loads(stored).values())))
    lines = [line for line in page.select({"type": GlyphRenderer}) if isinstance(line.glyph, Step)]
    dotted = [line.data_source.data for line in lines if line.glyph.line_dash == [2, 4]]
    assert len(dotted) == len(lines) // 2  # one for each cost; the hypervolume has no other
    known = pd.read_csv("runs/search/whole/trials.csv")
    best = known.sort_values(["tokens_per_s", "loss_nats"], ascending=[False, True])["loss_nats"].cummin().unique()
    assert any(len(line["median"]) == len(best) and (line["median"] == best).all() for line in dotted)
    itself = nas("report", "run=runs/search/whole", "reference=runs/search/whole", "name=itself")
    assert "100.0% of the best front's, and distance 0.0000 from it, after 27 evaluations" in itself.out


def test_a_sweep_over_paths_is_reported_whole(nas: Nas, workspace: Workspace) -> None:
    searches = workspace.runs / "search"
    for nested in ("warm_start-null", "warm_start-runs/search/base"):
        shutil.copytree(searches / "base", searches / "sweep" / nested)
    assert nas("report", "run=runs/search/sweep", "name=sweep").code == 0
    assert sorted(pd.read_csv("runs/report/sweep/metrics.csv")["run"]) == ["base", "warm_start-null"]
    (searches / "sweep" / "warm_start-null" / "complete.json").unlink()
    unfinished = nas("report", "run=runs/search/sweep", "name=again")
    assert unfinished.code == 1
    assert "name=sweep/warm_start-null to finish it" in unfinished.err


def test_within_limits_every_front_vector_counts(nas: Nas, workspace: Workspace) -> None:
    two = ["loss_nats", "kv_bytes_per_token"]
    sizes = pd.read_csv("runs/search/base/trials.csv")["kv_bytes_per_token"]
    limit = f"constraints.max_kv_bytes_per_token={sizes.min() + 0.3 * (sizes.max() - sizes.min())}"
    limited = (limit, f"objectives=[{','.join(two)}]", "sampler=random", "name=limited", *workspace.arguments)
    assert nas("search", "--budget", "27", *limited).code == 0
    assert nas("report", "run=runs/search/limited", "name=limited").code == 0
    trials, front = (pd.read_csv(f"runs/search/limited/{name}.csv")[two] for name in ("trials", "front"))
    reference = trials.max() + 0.1 * (trials.max() - trials.min())
    assert (front < reference).all(axis=None)
    found = pd.read_csv("runs/report/limited/metrics.csv")["hypervolume"].item()
    assert found == pytest.approx(moocore.hypervolume(front.to_numpy(), ref=reference.to_numpy()))


def test_three_objectives_are_drawn_pair_by_pair(nas: Nas, workspace: Workspace) -> None:
    objectives = "objectives=[loss_nats,decode_ms,kv_bytes_per_token]"
    assert nas("search", "--budget", 6, objectives, "name=three", *workspace.arguments).code == 0
    assert nas("report", f"run={workspace.runs}/search/three", "name=three").code == 0
    one_panel = 6.4 * 150
    assert Image.open(workspace.runs / "report" / "three" / "front.png").width > 1.5 * one_panel


def test_the_table_shows_every_objective() -> None:
    row = {"vector": "4-1", "loss_nats": 3.5, "parameters": 18_874_368, "memory_gib": 1.23456, "name": "knee"}
    printed = io.StringIO()
    Console(file=printed, width=100).print(front_table(pd.DataFrame([row]), Objectives(("loss_nats", "parameters"))))
    text = printed.getvalue()
    assert all(word in text for word in ("4-1 (knee)", "3.5000", "parameters", "18,874,368"))
    assert "1.23" not in text


def test_points_carry_the_names_of_reference_vectors() -> None:
    trials = pd.DataFrame({"vector": ["1-1", "2-2", "1-2"], "loss_nats": [3.0, 2.0, 2.5]})
    points = front_points(trials, {"uniform 1": (1, 1), "Published": (1, 2), "again": (1, 2)})
    assert points["name"].tolist() == ["uniform 1", "", "Published = again"]
    assert points["uniform"].tolist() == [True, False, False]


def test_the_heat_map_has_a_row_per_layer_and_a_column_per_front_point_lowest_loss_first() -> None:
    front = pd.DataFrame({"vector": ["1-2-4", "4-4-4"], "loss_nats": [3.0, 2.0]})
    matrix = group_matrix(front)
    assert matrix.to_numpy().tolist() == [[4, 1], [4, 2], [4, 4]]
    assert list(matrix.columns) == ["2.0000", "3.0000"]


def test_hypervolume_curves_have_median_and_range_of_their_group() -> None:
    def trials(*losses: float) -> pd.DataFrame:
        return pd.DataFrame({"loss_nats": losses, "tokens_per_s": [1.0] * len(losses)})

    runs = [("a", trials(3.0, 2.0)), ("a", trials(1.0)), ("b", trials(3.5))]
    table = curves(runs, TWO, np.array([4.0, 0.0]))
    assert table.to_numpy().tolist() == [
        ["a", 1, 2.0, 1.0, 3.0, 2],
        ["a", 2, 2.0, 2.0, 2.0, 1],
        ["b", 1, 0.5, 0.5, 0.5, 1],
    ]


def test_the_front_is_drawn_from_its_points_with_every_reference_vector_named() -> None:
    points = pd.DataFrame(
        {
            "vector": ["1-1", "2-2", "1-2", "2-1"],
            "loss_nats": [3.0, 2.0, 2.5, 2.8],
            "tokens_per_s": [30.0, 10.0, 20.0, 15.0],
            "on_front": [True, True, True, False],
            "name": ["uniform 1", "uniform 2", "Published", ""],
            "uniform": [True, True, False, False],
            "latency_source": "estimated",
        }
    )
    drawing = Figure()
    draw_front(drawing, points, TWO, [points[1:]])
    (axes,) = drawing.axes
    (reference,) = (line for line in axes.lines if line.get_label() == "reference's front (2)")
    assert np.asarray(reference.get_xydata()).tolist() == [[10.0, 2.0], [20.0, 2.5]]
    assert axes.get_xlabel() == "decode throughput (tokens/s) — estimated"
    assert axes.get_ylabel() == "inherited validation loss (nats/token)"
    assert {text.get_text() for text in axes.texts} == {"uniform 1", "uniform 2", "Published"}
    drawn = {str(dots.get_label()): np.asarray(dots.get_offsets()).tolist() for dots in axes.collections}
    assert sorted(drawn["evaluated (4)"]) == [[10.0, 2.0], [15.0, 2.8], [20.0, 2.5], [30.0, 3.0]]
    assert sorted(drawn["Pareto front (3)"]) == [[10.0, 2.0], [20.0, 2.5], [30.0, 3.0]]
    assert sorted(drawn["uniform"]) == [[10.0, 2.0], [30.0, 3.0]]
    assert drawn["known"] == [[20.0, 2.5]]


@pytest.mark.parametrize(("x", "y"), [("tokens_per_s", "loss_nats"), ("decode_ms", "loss_nats")])
def test_the_line_through_the_front_never_promises_more_than_was_found(x: str, y: str) -> None:
    objectives, better = Objectives((y, x)), 1 if METRICS[x].maximise else -1
    values = np.array([10.0, 20.0, 30.0])
    points = pd.DataFrame({x: values, y: better * np.array([1.0, 2.0, 3.0]) + 5, "on_front": True})
    points = points.assign(vector=["1", "2", "4"], name="", uniform=False, latency_source="measured")
    drawing = Figure()
    draw_front(drawing, points, objectives)
    (line,) = drawing.axes[0].lines
    corners = np.asarray(line.get_path().vertices)
    style = line.get_drawstyle()
    for (x0, y0), (x1, y1) in pairwise(corners):  # between two front points the worse loss of the two is attainable
        at_middle = y1 if style == "steps-pre" else y0
        assert at_middle == max(y0, y1), (x0, x1)


@pytest.mark.parametrize("words", [5, 400])
def test_a_figure_has_a_title_and_one_caption_line_that_fits(tmp_path: Path, words: int) -> None:
    caption = " ".join(["batch 64"] * words)
    with figure(tmp_path / "one", "tiny: Pareto front", caption) as drawing:
        drawing.subplots().plot([1, 2])
    assert drawing.get_suptitle() == "tiny: Pareto front"
    shown = drawing.get_supxlabel()
    assert "\n" not in shown
    assert shown == caption if words == 5 else caption.startswith(shown.removesuffix("…")) and shown.endswith("…")
    with plt.rc_context({"figure.dpi": 150}):
        written = plt.figure(figsize=(6.4, 4.2)).text(0, 0, shown, fontsize=6.5)
        assert written.get_window_extent().width <= 6.4 * 150
    assert Image.open(tmp_path / "one.png").info["Description"] == caption


def test_the_heat_map_shows_every_number_once() -> None:
    drawing = Figure()
    matrix = group_matrix(pd.DataFrame({"vector": ["1-2-4", "4-4-4"], "loss_nats": [3.0, 2.0]}))
    draw_groups(drawing, matrix)
    axes = drawing.axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "4", (0, 1): "4", (0, 2): "4", (1, 0): "1", (1, 1): "2", (1, 2): "4"}


@pytest.mark.parametrize("layers", [4, 32, 80])
def test_the_heat_map_grows_so_that_no_two_numbers_meet(layers: int) -> None:
    drawing = Figure()
    draw_groups(drawing, pd.DataFrame(np.ones((layers, 5), int)))
    assert 72 * (drawing.get_figheight() - 1.5) / layers > 7  # points, of which a number is 7 high


def test_hypervolume_is_drawn_as_steps_with_the_band_of_its_runs() -> None:
    rows = [("a", 1, 2.0, 1.0, 3.0, 2), ("a", 2, 4.0, 3.0, 5.0, 2), ("b", 1, 0.5, 0.5, 0.5, 1)]
    table = pd.DataFrame(rows, columns=["label", "evaluations", "median", "low", "high", "runs"])
    drawing = Figure()
    draw_hypervolume(drawing, table, TWO, np.array([4.0, 10.0]))
    (axes,) = drawing.axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert drawn == {"a (2 runs)": [[1, 2.0], [2, 4.0]], "b (1 run)": [[1, 0.5]]}
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 5.0)
    assert axes.get_title() == "reference point: loss_nats 4, tokens_per_s 10"


def test_the_check_is_drawn_measured_to_the_right_and_predicted_up_a_panel_per_workload() -> None:
    rows = [("decode", "1", 4, 16, 10.0, 11.0), ("decode", "2", 4, 16, 20.0, 20.0), ("prefill", "1", 4, 8, 5.0, 4.0)]
    rows += [("decode", "1", 2, 16, 3.0, 3.0), ("decode", "1", 4, 12, 7.0, 7.0)]
    check = pd.DataFrame(rows, columns=CHECK_COLUMNS)
    drawing = Figure()
    draw_check(drawing, check)
    shown = [axes for axes in drawing.axes if axes.get_visible()]
    drawn = [np.asarray(axes.collections[0].get_offsets()).tolist() for axes in shown]
    assert drawn == [[[3.0, 3.0]], [[7.0, 7.0]], [[10.0, 11.0], [20.0, 20.0]], [[5.0, 4.0]]]
    assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in shown} == {("measured (ms)", "predicted (ms)")}
    assert shown[2].get_title() == "decode, batch 4, 16 tokens\nmean error 5.00%, worst 10.00%, τ 1.000"
    assert shown[3].get_title() == "prefill, batch 4, 8 tokens\nmean error 20.00%, worst 20.00%"
    low, high = np.asarray(shown[2].lines[0].get_xydata()).tolist()
    assert low[0] == low[1] < 0.995 * 10.0
    assert high[0] == high[1] > 1.005 * 20.0
    assert [axes.get_legend_handles_labels()[0][1].get_label() for axes in shown[1:3]] == ["1 model", "2 models"]


def test_the_check_grows_with_its_panels_three_per_row() -> None:
    def size(panels: int) -> list[float]:
        rows = [("decode", "1", batch, 16, 10.0, 11.0) for batch in range(1, panels + 1)]
        drawing = Figure()
        draw_check(drawing, pd.DataFrame(rows, columns=CHECK_COLUMNS))
        return list(drawing.get_size_inches())

    widths, heights = zip(*map(size, range(1, 8)), strict=True)
    assert widths[0] < widths[1] < widths[2] == widths[6]
    assert heights[0] == heights[2] < heights[3] == heights[5] < heights[6]


def test_runs_are_labelled_by_sampler_and_by_what_else_varies_but_not_by_seed() -> None:
    def config(sampler: str, seed: int, **more: object) -> dict[str, Any]:
        return {"sampler": {"_target_": f"some.module.{sampler}Sampler", **more}, "seed": seed, "budget": "8"}

    configs = [config("TPE", 0), config("TPE", 1), config("NSGAII", 0, population_size=10)]
    assert _labels(configs) == ["TPE", "TPE", "NSGAII"]
    configs.append(config("NSGAII", 0, population_size=20))
    assert _labels(configs)[2:] == ["NSGAII, sampler.population_size 10", "NSGAII, sampler.population_size 20"]


def test_searches_of_different_things_are_not_compared(nas: Nas, workspace: Workspace) -> None:
    result = nas(
        "search", "-m", "workload.batch=2,1", "--budget", 4, "name=unlike", *workspace.arguments[:-3], "check=1"
    )
    assert result.code == 0, result.err
    report = nas("report", f"run={workspace.runs}/search/unlike", "name=unlike")
    assert report.code == 1
    assert "differ in workload; report each alone" in report.err


TRIALS = pd.DataFrame(
    [("1-1", 3.0, 20), ("2-2", 2.0, 40), ("4-4", 1.5, 80), ("1-2", 1.9, 30), ("4-1", 1.4, 50)],
    columns=["vector", "loss_nats", "kv_bytes_per_token"],
)


@pytest.mark.parametrize(
    ("uniform", "words"),
    [
        (["1-1", "2-2", "4-4"], "Beside uniform 4: .* 0.1000 nats lower, .* takes 37.5% fewer KV bytes"),
        (["2-2"], "Beside uniform 2: .* 0.1000 nats lower, .* takes 25.0% fewer KV bytes"),
        (["1-1"], "No evaluated vector is better"),
        ([], "No evaluated vector is better"),
    ],
)
def test_gains_over_uniform_vectors_are_at_their_bytes_and_at_their_loss(uniform: list[str], words: str) -> None:
    assert re.match(words, gain_sentence(TRIALS, uniform))


def test_the_distance_from_a_front_is_how_far_its_points_are_missed() -> None:
    best = np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])
    objectives = Objectives(("loss_nats", "decode_ms"))
    assert front_distance(best, best, objectives) == 0
    worse = best + np.array([0.2, 0.0])
    assert front_distance(worse, best, objectives) == pytest.approx(0.1)  # of a range of 2
    assert front_distance(best[:1], best, objectives) == pytest.approx((0 + 0.5 + 1) / 3)
    assert front_distance(best - 1, best, objectives) == 0
    flipped = Objectives(("loss_nats", "tokens_per_s"))
    assert front_distance(worse * [1, -1], best * [1, -1], flipped) == pytest.approx(0.1)
