"""report.html: what it computes, and that a browser shows it and links its views."""

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nas.report.front import attained, curves, front_points
from nas.report.learned import learned
from nas.report.page import draw_page
from nas.report.views import Page, costs, draw_volumes, marked
from nas.search import Objectives
from nas.space import SearchSpace, format_vector
from tests.conftest import Nas, Workspace

TWO = Objectives(("loss_nats", "tokens_per_s"))
CHROMIUM = shutil.which("chromium")
# Without a sandbox, which root lacks, and without what chromium does in the background.
FLAGS = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
SOURCE = "Bokeh.documents[0].get_model_by_name('vectors')"
DRAWN = "() => window.Bokeh?.documents[0]?.is_idle"


def all_losses(space: SearchSpace) -> pd.DataFrame:
    """A sum over layers, for every vector of a space."""
    vectors = list(itertools.product(*space.choices))
    losses = [3.0 + sum((4 - groups) * weight for groups, weight in zip(v, (1, 2, 5), strict=True)) for v in vectors]
    return pd.DataFrame({"vector": list(map(format_vector, vectors)), "loss_nats": losses, "on_front": False})


def test_moves_between_evaluated_vectors_are_what_was_measured(micro: SearchSpace) -> None:
    trials = all_losses(micro)
    _, moves = learned(trials, micro, ["4-4-4", "1-2-4"])
    assert len(moves) == 2 * 3 * 2
    assert set(moves["source"]) == {"inherited"}
    assert (moves["deviation_nats"] == 0).all()
    changes = moves.set_index(["base", "layer", "groups"])["change_nats"]
    assert changes["4-4-4", 0, 1] == pytest.approx(3)
    assert changes["1-2-4", 1, 4] == pytest.approx(-4)


def test_moves_to_other_vectors_are_estimated_within_their_deviation(micro: SearchSpace) -> None:
    everything = all_losses(micro)
    trials = everything[everything.index % 3 > 0].reset_index(drop=True)
    expected, moves = learned(trials, micro, ["4-4-4"])
    truth = everything.set_index("vector")["loss_nats"]
    estimated = moves[moves["source"] == "estimated"]
    assert 0 < len(estimated) < len(moves)
    assert (estimated["deviation_nats"] > 0).all()
    for row in estimated.to_dict("records"):
        moved = ["4", "4", "4"]
        moved[row["layer"]] = str(row["groups"])
        off = row["change_nats"] - (truth["-".join(moved)] - truth["4-4-4"])
        assert abs(off) < 4 * row["deviation_nats"]
    off = expected["expected_nats"] - expected["loss_nats"]
    assert off.std() < 0.2 * expected["loss_nats"].std()


def test_the_expected_loss_of_a_vector_does_not_know_its_own(
    micro: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = all_losses(micro)
    spoiled = trials.assign(loss_nats=trials["loss_nats"] + 0.1 * (trials.index == 13))
    before, after = (learned(one, micro, ["4-4-4"])[0]["expected_nats"] for one in (trials, spoiled))
    assert abs(after[13] - before[13]) < 0.05
    monkeypatch.setattr("nas.report.learned._MOST", 20)
    some, moves = learned(trials, micro, ["4-4-4"])
    assert some["expected_nats"].notna().sum() == 20
    assert set(moves["source"]) == {"inherited"}
    few, moves = learned(trials[:2], micro, ["1-1-1"])
    assert "expected_nats" not in few
    assert moves.empty


@pytest.mark.parametrize("metric", ["decode_ms", "tokens_per_s"])
def test_what_is_attained_is_the_best_loss_within_a_cost_in_each_run(metric: str) -> None:
    rng, sign = np.random.default_rng(0), -1 if metric == "tokens_per_s" else 1
    runs = [("a", rng.random((6, 2))), ("a", rng.random((4, 2))), ("b", rng.random((5, 2)))]
    tables = [(label, pd.DataFrame(values, columns=["loss_nats", metric])) for label, values in runs]
    found = attained(tables, [metric])
    for (label, count), cost in itertools.product((("a", 2), ("b", 1)), np.linspace(0, 1, 21)):
        best = [values[sign * values[:, 1] <= sign * cost, 0].min(initial=9) for of, values in runs if of == label]
        rows = found[(found["label"] == label) & (sign * found["cost"] <= sign * cost)]
        assert len(best) == count
        if max(best) == 9:
            assert rows.empty
        else:
            row = rows.iloc[(sign * rows["cost"]).argmax()]
            assert row[["median", "low", "high"]].tolist() == pytest.approx([np.median(best), min(best), max(best)])


@pytest.mark.parametrize("count", [1, 27])
def test_a_page_has_a_place_for_all_that_it_draws(micro: SearchSpace, count: int) -> None:
    trials = all_losses(micro)[-count:].reset_index(drop=True)
    size = trials["vector"].map(lambda vector: sum(map(int, vector.split("-"))))
    timed: dict[str, Any] = {"decode_ms": 1.0 * size, "tokens_per_s": 1e3 / size, "latency_source": "estimated"}
    counted: dict[str, Any] = {
        "batch": 1,
        "kv_bytes_per_token": 64 * size,
        "parameters": 1000 + size,
        "label": "front",
        "times": 1,
    }
    trials = trials.assign(**timed, **counted, evaluation=trials.index + 1, command="nas export <b>", on_front=True)
    points, moves = learned(front_points(trials, micro.reference_vectors()), micro, ["4-4-4"])
    html = draw_page(
        Page(
            title="<i>micro",
            caption="batch 1",
            vectors=points,
            fronts=attained([("front", trials)], costs(points)),
            volumes=curves([("front", trials)], TWO, np.array([1e3, 0.0])),
            reference="far",
            limits={"decode_ms": 9.0},
            levels=[1, 2, 4],
            moves=moves,
            check=pd.DataFrame(),
            runs=pd.DataFrame({"run": ["base"]}),
        ),
        TWO,
    )
    places, script = re.findall(r'data-root-id="(\w+)"', html), html[html.rindex("const render_items") :]
    roots = re.search(r'"roots":\{(.*?)\}', script)
    assert roots
    assert sorted(places) == sorted(re.findall(r'"(\w+)":', roots[1]))
    assert len(places) == (7 if count == 1 else 9)
    assert "<h1>&lt;i&gt;micro</h1>" in html
    assert "<b>" not in html[html.rindex("<main>") :]


def test_runs_of_the_same_vectors_are_not_taken_for_a_single_one(micro: SearchSpace) -> None:
    trials = all_losses(micro).assign(tokens_per_s=1.0, label="front", evaluation=1)
    page = Page(
        title="",
        caption="",
        vectors=front_points(trials, micro.reference_vectors()),
        fronts=attained([("front", trials)], ["tokens_per_s"]),
        volumes=curves([("front", trials), ("front", trials[::-1])], TWO, np.array([1e3, 0.0])),
        reference="far",
        limits={},
        levels=[1, 2, 4],
        moves=pd.DataFrame(),
        check=pd.DataFrame(),
        runs=pd.DataFrame(),
    )
    plot = draw_volumes(page, marked(page, "tokens_per_s"), {"tooltips": []})
    assert [item.label.value for item in plot.legend.items] == ["front (2 runs)"]


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs Debian's chromium (apt install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


def opened(browser: Any, file: Path) -> tuple[Any, list[str]]:
    """A page when all is drawn, and what it complains of and asks for, now and later."""
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.wait_for_function(DRAWN)
    return page, wrong


def test_a_browser_links_front_layers_and_table(nas: Nas, workspace: Workspace, browser: Any) -> None:
    assert nas("report", f"run={workspace.runs}/search/base", "name=page").code == 0
    file = workspace.runs / "report" / "page" / "report.html"
    assert file.stat().st_size < 5e6
    page, wrong = opened(browser, file)
    trials = pd.read_csv(workspace.runs / "search" / "base" / "trials.csv")
    points = trials[["tokens_per_s", "loss_nats"]].to_numpy()
    points = (points - points.min(0)) / np.ptp(points, axis=0)
    nearest = (np.linalg.norm(points[:, None] - points, axis=2) + 9 * np.eye(len(points))).min(1)
    dominated = int(np.argmax(nearest * ~trials["on_front"]))  # a point that no other one covers
    vector = trials["vector"][dominated]

    # A click on a point of the front marks the vector everywhere.
    place = page.evaluate(
        f"""() => {{
            const [source, view] = [{SOURCE}, Bokeh.index.find_one_by_id(
                Bokeh.documents[0].get_model_by_name('front').id)]
            const box = view.canvas_view.el.getBoundingClientRect()
            const [x, y] = ['x', 'loss_nats'].map(name => source.data[name][{dominated}])
            const [sx, sy] = [view.frame.x_scale.compute(x), view.frame.y_scale.compute(y)]
            return [box.x + sx, box.y + sy]
        }}"""
    )
    page.mouse.click(*place)
    page.wait_for_function(f"{SOURCE}.selected.indices.length > 0")
    assert page.evaluate(f"{SOURCE}.selected.indices") == [dominated]
    shown = page.locator("#selected")
    assert shown.locator("td").first.inner_text() == vector
    assert f"nas export run={workspace.runs}/search/base select={vector}" in shown.inner_text()
    front = trials["on_front"].sum()
    columns = page.evaluate(f"[...{SOURCE}.data.column]")
    assert sum(column is not None and column == column for column in columns) == front + 1
    assert columns[dominated] == (trials["loss_nats"][trials["on_front"]] < trials["loss_nats"][dominated]).sum()
    assert page.locator(".slick-row:has(input:checked)").locator(".r1").inner_text() == vector

    # The list of the front does the same by keyboard.
    best = trials[trials["on_front"]].sort_values("loss_nats", kind="stable").index.tolist()
    page.get_by_label("Front, lowest loss first").focus()
    for key, selected in (("ArrowDown", best[:1]), ("ArrowDown", best[1:2]), ("Shift+ArrowUp", best[:2])):
        page.keyboard.press(key)
        assert sorted(page.evaluate(f"{SOURCE}.selected.indices")) == sorted(selected)
    assert shown.locator("tr").first.locator("td").count() == 2

    # Another cost changes the axis and the points.
    axis = "Bokeh.documents[0].get_model_by_name('front').below[0].axis_label"
    assert page.evaluate(axis) == "decode throughput (tokens/s), measured"
    page.get_by_label("Cost", exact=True).select_option(label="KV cache (bytes/token)")
    assert page.evaluate(axis) == "KV cache (bytes/token), counted"
    assert page.evaluate(f"[...{SOURCE}.data.x]") == trials["kv_bytes_per_token"].tolist()
    page.get_by_label("log cost").check()
    assert page.evaluate("Bokeh.documents[0].get_model_by_name('front').x_scale.type") == "LogScale"

    # The table's filter.
    rows = page.locator(".slick-row")
    assert rows.count() == len(trials)
    bound = trials["kv_bytes_per_token"].median()
    page.get_by_label("Filter").fill(f"4 kv_bytes_per_token<{bound}")
    expected = trials[trials["vector"].str.contains("4") & (trials["kv_bytes_per_token"] < bound)]
    assert sorted(rows.locator(".r1").all_inner_texts()) == sorted(expected["vector"])
    assert wrong == []
