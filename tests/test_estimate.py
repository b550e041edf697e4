"""Estimates: closed forms, what can only make a model slower, and the A10G's calibration against its own facts."""

import dataclasses
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import shipped
from nas.config import WorkloadConfig
from nas.errors import UserError
from nas.files import read_json
from nas.latency import Device, Workload, find_device, resolve_workload
from nas.latency.estimate import RooflineLatency, elementwise_values
from nas.latency.predictor import PHASES, Phase
from nas.space import SearchSpace, load_space

SCRIPT = Path(__file__).parents[1] / "scripts" / "calibrate_a10g.py"
calibrate_a10g = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
GPU = Device("nvidia-x", "NVIDIA X", True, 2**34, bandwidth_bytes_per_s=1e12, flops={"bf16": 2e14, "fp32": 1e14})
A10G = find_device("nvidia-a10g")
SHAPE = load_space("decilm-6b").shape
sizes, lengths = st.integers(1, 256), st.integers(1, 4096)


class Recomputed(NamedTuple):
    """What the script makes of the facts."""

    calibration: dict[str, Any]
    errors: pd.DataFrame


def calibrated(**constants: float) -> Device:
    check = {"points": 20, "median_error": 0.061, "worst_error": 0.3, "low": 0.8, "high": 1.5}
    engines = {
        "none": {"step_ms": 0.0, "sequence_ms": 0.0, "check": check},
        "tgi": {"step_ms": 2.0, "sequence_ms": 0.5, "most_sequences": 16, "check": check | {"points": 9, "high": 1.2}},
    }
    calibration = {"dtypes": ["bf16"], "constants": constants, "measurements": 75, "engines": engines}
    return dataclasses.replace(GPU, calibration=calibration)


def test_the_roofline_is_bytes_or_operations_whichever_takes_longer(micro: SearchSpace) -> None:
    model = RooflineLatency(GPU, micro.shape, "fp32")
    weights = 4 * micro.shape.layer(2).parameters
    cache = 4 * 16 * 2 * 2 * 8 * 4  # batch, context, K and V, groups, head width, bytes
    assert model.layer_ms("decode", 2, 4, 16) == pytest.approx(1e3 * (weights + cache) / 1e12)
    slow = RooflineLatency(Device("s", "S", True, 1, 1e12, {"fp32": 1e9}), micro.shape, "fp32")
    operations = 2 * 4 * micro.shape.layer(2).parameters + 4 * 4 * 16 * 4 * 8  # products with weights, attention
    assert slow.layer_ms("decode", 2, 4, 16) == pytest.approx(1e3 * operations / 1e9)


def test_the_data_sheet_of_an_a10g_reads_llama_2_7b_at_its_bandwidth() -> None:
    space = load_space("llama-2-7b")
    model = RooflineLatency(dataclasses.replace(A10G, calibration=None), space.shape, "bf16")
    step = model.decode_ms(space.largest, 1, 1)
    assert step == pytest.approx(2 * (space.shape.parameters(space.largest) - 32000 * 4096) / 600e9 * 1e3, rel=1e-3)
    assert (model.source, model.interval(step)) == ("estimated", (step, math.inf))


def test_a_calibrated_layer_is_the_sum_of_its_kernels(micro: SearchSpace) -> None:
    device = calibrated(
        weight_bandwidth=0.5,
        cache_bandwidth=0.8,
        elementwise_bandwidth=0.4,
        compute=0.25,
        overlap=1.0,
        cache_ramp_tokens=64.0,
        attention_ms=0.01,
        elementwise_ms=1e-6,
    )
    weights = micro.shape.layer(2).parameters
    products = 2 * weights / 0.5e12 + 2 * 4 * weights / 0.5e14
    attention = 4 * (16 + 64) * 2 * 2 * 8 * 2 / 0.8e12 + 4 * 4 * 16 * 4 * 8 / 0.5e14
    elementwise = 2 * 4 * elementwise_values(micro.shape.layer(2)) / 0.4e12
    expected = 0.01 + 1e3 * (products + attention + elementwise)
    assert RooflineLatency(device, micro.shape, "bf16").layer_ms("decode", 2, 4, 16) == pytest.approx(expected)


def test_little_work_takes_the_fixed_times(micro: SearchSpace) -> None:
    device = calibrated(elementwise_bandwidth=1.0, attention_ms=3.0, elementwise_ms=5.0)
    assert RooflineLatency(device, micro.shape, "bf16").layer_ms("decode", 1, 1, 1) == pytest.approx(8, rel=1e-4)


def test_embedding_and_head_are_a_row_of_the_embedding_a_token_and_the_head_once_a_sequence(micro: SearchSpace) -> None:
    model = RooflineLatency(calibrated(elementwise_bandwidth=0.5), micro.shape, "bf16")
    hidden = micro.shape.hidden_size
    head_ms = 1e3 * 2 * micro.shape.vocab_size * hidden / 1e12
    assert model.embedding_and_head_ms("decode", 3, 99) == pytest.approx(head_ms + 1e3 * 3 * 2 * 2 * hidden / 0.5e12)
    assert model.embedding_and_head_ms("prefill", 3, 99) == pytest.approx(
        head_ms + 1e3 * 3 * 99 * 2 * 2 * hidden / 0.5e12
    )


@given(st.sampled_from(PHASES), sizes, sizes, lengths, lengths)
@settings(max_examples=100)
def test_more_groups_sequences_or_context_are_slower(phase: Phase, b1: int, b2: int, l1: int, l2: int) -> None:
    model = RooflineLatency(A10G, SHAPE, "bf16")
    few, many, short, long = min(b1, b2), max(b1, b2) + 1, min(l1, l2), max(l1, l2) + 1
    times = [model.layer_ms(phase, groups, few, short) for groups in (1, 2, 4)]
    assert times == sorted(set(times))
    assert times[0] < model.layer_ms(phase, 1, many, short)
    assert times[0] < model.layer_ms(phase, 1, few, long)


@given(st.sampled_from(PHASES), st.sampled_from([1, 2, 4]), sizes, lengths)
@settings(max_examples=100)
def test_nothing_beats_the_data_sheet(phase: Phase, groups: int, batch: int, length: int) -> None:
    sheet = RooflineLatency(dataclasses.replace(A10G, calibration=None), SHAPE, "bf16")
    model = RooflineLatency(A10G, SHAPE, "bf16")
    assert model.layer_ms(phase, groups, batch, length) > sheet.layer_ms(phase, groups, batch, length)
    assert model.embedding_and_head_ms(phase, batch, length) > sheet.embedding_and_head_ms(phase, batch, length)


def test_an_estimate_says_what_it_rests_on_and_how_far_off_it_may_be() -> None:
    model = RooflineLatency(calibrated(), SHAPE, "bf16")
    assert model.interval(10.0) == pytest.approx((8.0, 15.0))
    assert model.description == (
        "estimated: the GPU's time, calibrated from 75 published measurements; 20 decode steps of serving engines, "
        "each predicted without its source, were off by 6.1% in the median, 30.0% at worst"
    )
    uncalibrated = RooflineLatency(calibrated(), SHAPE, "fp32")  # nothing of fp32 is published
    assert uncalibrated.description == "estimated from the data sheet of NVIDIA X"
    assert uncalibrated.interval(10.0) == (10.0, math.inf)


def test_an_engine_adds_its_share_to_a_decode_step_and_has_its_own_interval() -> None:
    vector = [4] * SHAPE.num_hidden_layers
    alone, served = (RooflineLatency(calibrated(), SHAPE, "bf16", engine) for engine in ("none", "tgi"))
    assert served.decode_ms(vector, 16, 512) == pytest.approx(alone.decode_ms(vector, 16, 512) + 2.0 + 16 * 0.5)
    assert served.prefill_ms(vector, 16, 512) == alone.prefill_ms(vector, 16, 512)
    assert served.interval(10.0) == pytest.approx((8.0, 12.0))
    assert served.description.startswith("estimated: the GPU's time and what tgi adds, calibrated from 75 published")
    with pytest.raises(
        UserError, match=r"engine=tgi: .* up to 16 sequences, not for 17; lower workload\.batch, or use"
    ):
        served.decode_ms(vector, 17, 512)
    assert alone.decode_ms(vector, 17, 512) > 0


@pytest.mark.parametrize(("device", "dtype"), [(GPU, "bf16"), (calibrated(), "fp32")])
def test_an_engine_that_an_estimate_does_not_know_is_one_sentence(device: Device, dtype: str) -> None:
    message = (
        rf"^workload\.engine is 'tgi', but what that adds to a step of NVIDIA X in {dtype} is not known; use none$"
    )
    with pytest.raises(UserError, match=message):
        resolve_workload(WorkloadConfig(dtype=dtype, engine="tgi"), SHAPE, device)
    assert resolve_workload(WorkloadConfig(dtype=dtype), SHAPE, device).engine == "none"


def test_a_workload_knows_its_engine_and_is_recorded_as_before_without_one() -> None:
    with pytest.raises(UserError, match=r"engine is 'foo'.* use none, tgi$"):
        resolve_workload(WorkloadConfig(engine="foo"), SHAPE, calibrated())
    for batch in (8, "max"):
        served = resolve_workload(WorkloadConfig(batch=batch, engine="tgi"), SHAPE, calibrated())
        assert str(served).endswith(", engine tgi")
        assert Workload(**served.to_dict()) == served
    alone = resolve_workload(WorkloadConfig(batch=8), SHAPE, calibrated())
    assert "engine" not in str(alone) and "engine" not in alone.to_dict()


def test_a_device_with_its_calibration_is_written_as_it_was_read() -> None:
    assert A10G.description() == read_json(shipped("latency_models") / "nvidia-a10g" / "device.json")
    assert "calibration" not in GPU.description()


@pytest.fixture(scope="module")
def recomputed() -> Recomputed:
    return Recomputed(*calibrate_a10g.calibrate())


def test_the_frozen_constants_and_errors_are_what_the_facts_give(recomputed: Recomputed) -> None:
    calibration, errors = recomputed
    assert A10G.calibration == calibration
    sources, headline = calibrate_a10g.by_source(errors), calibrate_a10g.headline(calibration)
    for name, table in (("errors", errors), ("sources", sources), ("headline", headline)):
        frozen = pd.read_csv(calibrate_a10g.OUT / f"{name}.csv")
        assert set(frozen.pop("date")) == {calibration["date"]}
        assert set(frozen.pop("made_by")) == {"scripts/calibrate_a10g.py"}
        pd.testing.assert_frame_equal(frozen, table, check_dtype=False)
    page = calibrate_a10g.PAGE.read_text(encoding="utf-8")
    for text in (
        calibrate_a10g.sources_table(sources),
        calibrate_a10g.engines_table(calibration["engines"]),
        calibrate_a10g.headline_table(headline),
    ):
        assert text in page


@pytest.mark.parametrize("origin", ["philschmid/llmperf", "zzc0721/torch-performance-test-data", "microsoft/vidur"])
def test_no_point_is_predicted_with_its_own_source(origin: str, recomputed: Recomputed) -> None:
    cards, operators, published = calibrate_a10g.read_facts()
    double = {origin: 2.0}
    moved = published.assign(value=published["value"] * published["origin"].map(double).fillna(1))
    kernels = operators.assign(median_ms=operators["median_ms"] * operators["origin"].map(double).fillna(1))
    after, before = calibrate_a10g.predict_all(cards, kernels, moved), recomputed.errors
    columns = ["predicted", "with_line"]
    own = before["origin"] == origin
    pd.testing.assert_frame_equal(after.loc[own, columns], before.loc[own, columns])
    assert not after.loc[~own, columns].equals(before.loc[~own, columns])  # so the change would have shown


def test_an_interval_holds_its_share_of_the_steps_of_further_sources() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(300):
        means = random.normal(0.1, 0.2, 7)
        steps = np.exp(means + random.normal(0, 0.1, (20, 7)))
        origins = pd.Series(np.tile(np.arange(6), 20))
        low, high = calibrate_a10g.interval(pd.Series(steps[:, :6].ravel()), origins)
        held += ((steps[:, 6] > low) & (steps[:, 6] < high)).sum()
    assert held / 6000 == pytest.approx(0.9, abs=0.03)


def test_every_point_is_predicted_or_says_why_not(recomputed: Recomputed) -> None:
    assert (recomputed.errors["predicted"].isna() == recomputed.errors["why_not"].notna()).all()


@pytest.mark.parametrize("file", sorted(shipped("latency_models").glob("*/device.json")), ids=lambda p: p.parent.name)
def test_every_shipped_device_is_one_that_its_own_name_leads_to_and_can_be_estimated(
    file: Path, micro: SearchSpace
) -> None:
    device = find_device(file.parent.name)
    assert device.slug == file.parent.name == device.name.lower().replace(" ", "-")
    assert device.memory_bytes > 2**30
    for dtype in ("bf16", "fp32"):
        assert RooflineLatency(device, micro.shape, dtype).layer_ms("decode", 1, 8, 16) > 0


def test_a_layers_elementwise_kernels_move_what_their_tensors_hold(micro: SearchSpace) -> None:
    """Each tensor of hidden size 32 that a norm, a residual, the rotation or SwiGLU reads or writes, one by one."""
    norms = (32 + 32) * 2
    residuals = (32 + 32 + 32) * 2
    rotation = (4 * 8 + 4 * 8) + (2 * 8 + 2 * 8)  # queries of 4 heads and keys of 2, read and written
    swiglu = 256 + 256 + 256
    assert elementwise_values(micro.shape.layer(2)) == norms + residuals + rotation + swiglu == 1184
