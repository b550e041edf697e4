"""The figures that README and docs quote are those of the CSVs beside them."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nas.files import read_json

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RUNTIMES = ("compiled", "eager")
KINDS = ("inherited", "further")


def page(name: str) -> str:
    """The text of a page, with single spaces."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A script's functions."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts" / request.param))


@pytest.mark.parametrize("script", ["bench_search.py"], indirect=True)
def test_the_search_benchmark_is_quoted_as_measured(script: dict[str, Any]) -> None:
    table = script["ordered"](pd.read_csv(DOCS / "search" / "bench.csv"))
    assert script["short_table"](table) in (DOCS / "search.md").read_text(encoding="utf-8")
    assert script["full_table"](table) in (DOCS / "search" / "table.md").read_text(encoding="utf-8")

    medians = 100 * table.groupby(["problem", "evaluations", "sampler"])["share"].median()
    noisy = medians["noisy", 50]
    assert f"Optuna's Gaussian process has {noisy['gp']:.1f} % (one seed) and `front` {noisy['front']:.1f} %" in page(
        "README.md"
    )
    links = [medians[name, 100] for name in ("additive", "saturating", "exploding", "signed")]
    baseline, front = ([one[sampler] for one in links] for sampler in ("one-at-a-time", "front"))
    adjacent, distant = (medians[name, 500] for name in ("adjacent", "distant"))
    assert (
        f"{min(baseline):.1f} to {max(baseline):.1f} % of the sums behind monotone functions after 100 evaluations "
        f"(`front` {min(front):.1f} to {max(front):.1f} %), but {adjacent['one-at-a-time']:.1f} % with coupled layers "
        f"after 500 (`front` {distant['front']:.1f} to {adjacent['front']:.0f} %)"
    ) in page("README.md")


def test_the_search_is_within_its_quartiles_of_the_best_but_for_the_case_that_is_named() -> None:
    table = pd.read_csv(DOCS / "search" / "bench.csv")
    behind = []
    for place, rows in table.groupby(["problem", "evaluations"]):
        others = rows[rows["sampler"] != "front"].groupby("sampler")["share"].median()
        if rows.loc[rows["sampler"] == "front", "share"].quantile(0.75) < others.max() - 1e-9:
            behind.append(place)
    assert behind == [("noisy", 50)]


@pytest.mark.parametrize("script", ["headline.py"], indirect=True)
def test_the_headline_is_quoted_as_measured(script: dict[str, Any]) -> None:
    rows = pd.read_csv(DOCS / "headline" / "headline.csv")
    vllm = script["served_by_vllm"]()
    assert script["beside_the_announcement"](rows, vllm) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["table"](rows, vllm) in (DOCS / "latency.md").read_text(encoding="utf-8")
    errors = script["predicted"](rows)
    pd.testing.assert_frame_equal(errors, pd.read_csv(DOCS / "headline" / "predicted.csv"))
    compiled, eager = (100 * errors.loc[errors["runtime"] == name, "relative_error"].abs() for name in RUNTIMES)
    assert (
        f"headline.csv below by {compiled.mean():.1f} % and {compiled.max():.1f} %. The eager tables miss those "
        f"by {eager.mean():.0f} % and {eager.max():.0f} %"
    ) in page("README.md")
    assert f"{compiled.mean():.1f} % off in the mean and {compiled.max():.1f} % at worst" in page("docs/latency.md")


@pytest.mark.parametrize("script", ["lasting_check.py"], indirect=True)
def test_lasting_steps_are_quoted_as_measured(script: dict[str, Any]) -> None:
    found = script["errors"](script["beside_predictions"](pd.read_csv(DOCS / "latency" / "lasting.csv")))
    pd.testing.assert_frame_equal(found, pd.read_csv(DOCS / "latency" / "lasting_errors.csv"))
    assert script["markdown"](found) in (DOCS / "latency.md").read_text(encoding="utf-8")
    decode = found[(found["phase"] == "decode") & (found["vectors"] == 12)]
    earlier = 100 * found[found["date"] == found["date"].min()][["mean", "worst"]]
    low, high, worst = 100 * decode["mean"].min(), 100 * decode["mean"].max(), 100 * decode["worst"].max()
    assert f"by {low:.1f} to {high:.1f} % in the mean of a workload, {worst:.1f} % at worst" in page("README.md")
    assert f"mean and {earlier['worst'].max():.1f} % at worst" in page("docs/latency.md")


@pytest.mark.parametrize("script", ["vllm_check.py"], indirect=True)
def test_vllm_is_quoted_as_measured(script: dict[str, Any]) -> None:
    rows = script["beside_predictions"](pd.read_csv(DOCS / "vllm" / "served.csv"))
    pd.testing.assert_frame_equal(rows, pd.read_csv(DOCS / "vllm" / "check.csv"))
    of = rows.set_index("model")
    ratios = of.loc[["Llama-2-7B", "DeciLM-6B"], "vllm_over_ours"]
    assert f"take {ratios.iloc[0]:.2f} and {ratios.iloc[1]:.2f} times as long" in page("docs/latency.md")


def records(name: str, keys: list[str]) -> dict[Any, dict[str, Any]]:
    """The rows of a CSV under docs, by the values of some columns."""
    return {tuple(row[key] for key in keys): dict(row) for _, row in pd.read_csv(DOCS / name).iterrows()}


def test_fidelity_is_quoted_as_measured() -> None:
    rows = records("fidelity/agreement.csv", ["setting", "truth", "among", "predictor"])
    high, low = ("{}, learning rate 2e-3".format, "{}, learning rate 5e-4".format)
    rules = ("sliced", "pooled", "separate")
    further = [rows[high(rule), "further", "all", "inherited"]["tau"] for rule in rules]
    total = rows[high("sliced"), "further", "all", "total"]["tau"]
    quoted = "was {:.2f} (`sliced`), {:.2f} (`pooled`) and {:.2f} (`separate`)".format(*further)
    assert f"{quoted}, where the total of groups alone reaches {total:.2f}" in page("README.md")
    noise, alone = (rows[setting("sliced"), "alone", "all", "inherited"] for setting in (high, low))
    assert f"(τ −{-noise['tau']:.2f}; noise ceiling {noise['ceiling']:.2f})" in page("README.md")
    of_total = rows[low("sliced"), "alone", "all", "total"]["tau"]
    interval = f"95 % interval {alone['low']:.2f} to {alone['high']:.2f}"
    assert f"was {alone['tau']:.2f} ({interval}), that of the total of groups {of_total:.2f}" in page("README.md")
    gaps = pd.read_csv(DOCS / "fidelity" / "gaps.csv").groupby("rule")["gap_percent"].mean()
    assert f"was {gaps['sliced']:.1f} % above a plain model's" in page("README.md")


def test_what_further_training_changes_is_quoted_as_measured() -> None:
    changes, deviations, inherited_deviations = [], [], []
    for rule in ("sliced", "pooled", "separate"):
        rows = pd.read_csv(DOCS / "fidelity" / f"{rule}.csv")
        inherited, further = (rows[rows["kind"] == kind].set_index("vector")["loss_nats"] for kind in KINDS)
        changes.append((inherited - further).mean())
        deviations.append((inherited - further).std())
        inherited_deviations.append(inherited.std())
    assert (
        f"by {min(changes):.3f} to {max(changes):.3f} nats with a deviation of {min(deviations):.4f} to "
        f"{max(deviations):.4f}, where the inherited losses' is {min(inherited_deviations):.3f} to "
        f"{max(inherited_deviations):.3f}"
    ) in page("docs/fidelity.md")


def test_the_small_trained_checkpoint_is_quoted_as_measured() -> None:
    rows = records("stories260k/losses.csv", ["vector"])
    one, largest = rows["1-1-1-1-1",], rows["4-4-4-4-4",]
    original = rows["checkpoint in transformers",]["before_nats"]
    assert round(original, 3) == round(largest["before_nats"], 3)
    assert (
        f"transformers' loss, {original:.3f} nats, and one K/V head everywhere {one['before_nats']:.2f}; after "
        f"{one['steps']} steps these are {largest['after_nats']:.2f} and {one['after_nats']:.2f}"
    ) in page("README.md")


def test_the_estimate_of_the_a10g_is_quoted_as_measured() -> None:
    errors = pd.read_csv(DOCS / "a10g" / "errors.csv").dropna(subset="predicted")
    steps = errors[errors["kind"] == "decode step"]
    size, inside = 100 * steps["relative_error"].abs(), steps["inside"].astype(bool)
    check = read_json(ROOT / "latency_models" / "nvidia-a10g" / "device.json")["calibration"]["engines"]["none"][
        "check"
    ]
    off = f"it is {size.median():.1f} % off in the median and {size.max():.0f} % at worst"
    factors = f"{check['low']:.2f} to {check['high']:.2f} times the estimate"
    readme, docs = page("README.md"), page("docs/a10g.md")
    assert (
        f"Of {len(steps)} published decode steps of serving engines, each predicted without its source, {off}" in readme
    )
    assert (
        f"the interval in front.csv, {factors}, held {inside.sum()} of them when made from the other sources" in readme
    )
    assert f"Of {len(steps)} published decode steps of serving engines, from six sources" in docs
    assert (
        f"{off}: TGI of 2023 with 20 users. {(steps['published'] > steps['predicted']).sum()} of them took longer"
        in docs
    )
    assert f"expected: {factors}" in docs
    assert f"held {inside.sum()} of the {len(steps)} steps; it missed TGI's with 10 and 20 users" in docs
    assert list(steps.loc[~inside, "batch"]) == [10, 20]
    assert steps["origin"].nunique() == 6

    def medians(engine: str, column: str) -> pd.Series:
        rows = steps[steps["stack"].str.startswith(engine)]
        return 100 * (rows[column] / rows["published"] - 1).abs().groupby(rows["origin"], sort=False).median()

    before, after = ([f"{value:.0f}" for value in medians("TGI", column)] for column in ("predicted", "with_line"))
    quoted = "{}, {} and {} % to {}, {} and {} %".format(*before, *after)
    assert f"The line takes the sources' median error from {quoted}" in docs
    tgi = steps[steps["stack"].str.startswith("TGI")].groupby("origin", sort=False)
    slopes = [f"{np.polyfit(rows['batch'], rows['published'] - rows['predicted'], 1)[0]:.1f}" for _, rows in tgi]
    assert "(IBM, SageMaker) give {} and {} ms per sequence, 2.0.4 of 2024 {}.".format(*slopes) in docs
    line, nothing = (medians("vLLM", column).mean() for column in ("with_line", "predicted"))
    assert f"misses the third by {line:.0f} % (mean of their medians), nothing by {nothing:.0f} %" in docs
    longer = 100 * (steps["published"] / steps["predicted"] - 1)
    early, late = (longer[steps["stack"] == f"vLLM {version}"] for version in ("0.4.3", "0.23.0"))
    assert f"0.4.3 on an A10G took {early.min():.0f} to {early.max():.0f} % longer than the GPU's time" in docs
    assert f"A6000 {-late.iloc[0]:.0f} % less with few sequences and {late.iloc[-1]:.0f} % more with 215" in docs

    rows = pd.read_csv(DOCS / "a10g" / "headline.csv").set_index(["memory_gib", "model"])
    usable, announced = rows.loc[21.73], rows.loc[float("nan")]
    over = [usable, announced]
    ratios = [part["tokens_per_s"]["DeciLM-6B"] / part["tokens_per_s"]["Llama-2-7B"] for part in over]
    batches = [part["batch"][name] for part in over for name in ("DeciLM-6B", "Llama-2-7B")]
    prefill = usable["tokens_per_s_with_prefill"]
    assert (
        "it gives {:.1f} × ({} sequences against {}, what an A10G leaves) or {:.1f} × ({} against {}), ".format(
            ratios[0], *batches[:2], ratios[1], *batches[2:]
        )
        + f"and {prefill['DeciLM-6B'] / prefill['Llama-2-7B']:.1f} × with prefill"
    ) in readme
