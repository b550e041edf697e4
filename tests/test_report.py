"""Reports: what the figures show, and that they come from the CSVs alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nas.report.check import check_errors
from nas.report.front import front_points
from nas.report.groups import group_matrix
from nas.report.hypervolume import SearchCurve, curves
from nas.search import Objectives
from tests.conftest import Nas, Workspace

TWO = Objectives(("loss_nats", "tokens_per_s"))
FIGURES = ("front", "groups", "hypervolume", "latency_check")


def assert_drawn(folder: Path, names: tuple[str, ...] = FIGURES) -> None:
    for name in names:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert 0.005 < (pixels < 200).mean() < 0.9, f"{name} is empty or black"
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")


def test_a_report_draws_every_figure_and_prints_the_front(nas: Nas, workspace: Workspace) -> None:
    result = nas("report", f"run={workspace.runs}/search/base", f"runs_dir={workspace.runs}", "name=base")
    assert result.code == 0, result.err
    assert_drawn(workspace.runs / "report" / "base")
    front = pd.read_csv(workspace.runs / "search" / "base" / "front.csv")
    for vector in front["vector"]:
        assert vector in result.out


def test_a_sweep_is_compared_by_sampler_with_the_spread_over_seeds(nas: Nas, workspace: Workspace) -> None:
    where = (f"runs_dir={workspace.runs}", "name=sweep")
    swept = ("-m", "sampler=nsga2,tpe", "seed=0,1", "--budget", "8")
    result = nas("search", *swept, *where, *workspace.arguments)
    assert result.code == 0, result.err
    folders = {path.parent.name for path in (workspace.runs / "search" / "sweep").glob("*/complete.json")}
    assert folders == {f"sampler-{sampler}_seed-{seed}" for sampler in ("nsga2", "tpe") for seed in (0, 1)}
    report = nas("report", f"run={workspace.runs}/search/sweep", *where)
    assert report.code == 0, report.err
    assert "NSGAII: hypervolume" in report.out
    assert "TPE: hypervolume" in report.out
    assert "after 8 evaluations (median of 2)" in report.out
    assert_drawn(workspace.runs / "report" / "sweep")


def test_three_objectives_are_drawn_pair_by_pair(nas: Nas, workspace: Workspace) -> None:
    where = (f"runs_dir={workspace.runs}", "name=three")
    objectives = "objectives=[loss_nats,decode_ms,kv_bytes_per_token]"
    assert nas("search", "--budget", 6, objectives, *where, *workspace.arguments).code == 0
    assert nas("report", f"run={workspace.runs}/search/three", *where).code == 0
    two, three = (
        Image.open(workspace.runs / "report" / name / "front.png").width
        for name in (make_base_report(nas, workspace), "three")
    )
    assert three > 1.5 * two


def make_base_report(nas: Nas, workspace: Workspace) -> str:
    where = (f"runs_dir={workspace.runs}", "name=base2")
    nas("report", f"run={workspace.runs}/search/base", *where)
    return "base2"


def test_points_carry_the_names_of_landmarks() -> None:
    trials = pd.DataFrame({"vector": ["1-1", "2-2", "1-2"], "loss_nats": [3.0, 2.0, 2.5]})
    landmarks = pd.DataFrame({"name": ["uniform 1", "Published"], "vector": ["1-1", "1-2"]})
    points = front_points(trials, landmarks)
    assert points["name"].tolist() == ["uniform 1", "", "Published"]
    assert points["uniform"].tolist() == [True, False, False]


def test_the_heat_map_has_a_row_a_layer_and_a_column_a_front_point_lowest_loss_first() -> None:
    front = pd.DataFrame({"vector": ["1-2-4", "4-4-4"], "loss_nats": [3.0, 2.0]})
    matrix = group_matrix(front)
    assert matrix.to_numpy().tolist() == [[4, 1], [4, 2], [4, 4]]
    assert list(matrix.columns) == ["2.0000", "3.0000"]


def test_hypervolume_curves_have_median_and_range_of_their_group() -> None:
    def trials(*losses: float) -> pd.DataFrame:
        return pd.DataFrame({"loss_nats": losses, "tokens_per_s": [1.0] * len(losses)})

    runs = [SearchCurve("a", trials(3.0, 2.0)), SearchCurve("a", trials(1.0)), SearchCurve("b", trials(3.5))]
    table = curves(runs, TWO, np.array([4.0, 0.0]))
    assert table.to_numpy().tolist() == [
        ["a", 1, 2.0, 1.0, 3.0, 2],
        ["a", 2, 2.0, 2.0, 2.0, 1],
        ["b", 1, 0.5, 0.5, 0.5, 1],
    ]


def test_check_errors_are_relative_to_the_measurement() -> None:
    check = pd.DataFrame({"measured_ms": [10.0], "predicted_ms": [11.0]})
    assert check_errors(check)["error"].tolist() == pytest.approx([0.1])
