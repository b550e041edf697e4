"""Estimates: closed forms, what can only make a model slower, and the A10G's calibration against its own facts."""

import dataclasses
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import shipped
from nas.files import read_json
from nas.latency import Device, find_device
from nas.latency.estimate import RooflineLatency, elementwise_values
from nas.latency.predictor import PHASES, Phase
from nas.space import SearchSpace, load_space

SCRIPT = Path(__file__).parents[1] / "scripts" / "calibrate_a10g.py"
calibrate_a10g = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
GPU = Device("nvidia-x", "NVIDIA X", True, 2**34, bandwidth_bytes_per_s=1e12, flops={"bf16": 2e14, "fp32": 1e14})
A10G = find_device("nvidia-a10g")
SHAPE = load_space("decilm-6b").shape
sizes, lengths = st.integers(1, 256), st.integers(1, 4096)


def calibrated(**constants: float) -> Device:
    check = {"points": 20, "median_error": 0.061, "worst_error": 0.3, "interval_share": 0.9, "interval_factor": 1.25}
    calibration = {"dtypes": ["bf16"], "constants": constants, "measurements": 75, "check": check}
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
    assert model.interval(10.0) == pytest.approx((8.0, 12.5))
    assert model.description == (
        "estimated: calibrated from 75 published measurements, median error 6.1% over 20 that were each predicted "
        "without their source"
    )
    uncalibrated = RooflineLatency(calibrated(), SHAPE, "fp32")  # nothing of fp32 is published
    assert uncalibrated.description == "estimated from the data sheet of NVIDIA X"
    assert uncalibrated.interval(10.0) == (10.0, math.inf)


def test_a_device_with_its_calibration_is_written_as_it_was_read() -> None:
    assert A10G.description() == read_json(shipped("latency_models") / "nvidia-a10g" / "device.json")
    assert "calibration" not in GPU.description()


def test_the_frozen_constants_and_errors_are_what_the_facts_give() -> None:
    calibration, errors = calibrate_a10g.calibrate()
    assert A10G.calibration == calibration
    pd.testing.assert_frame_equal(pd.read_csv(calibrate_a10g.ERRORS), errors, check_dtype=False)
    assert calibrate_a10g.markdown(errors) in calibrate_a10g.PAGE.read_text(encoding="utf-8")


def test_no_point_is_predicted_with_its_own_source() -> None:
    cards, operators, published = calibrate_a10g.read_facts()
    before = calibrate_a10g.predict_all(cards, operators, published)
    for source in published["source"].unique()[::4]:  # each takes a calibration of its own
        moved = published.assign(value=published["value"].where(published["source"] != source, published["value"] * 2))
        after = calibrate_a10g.predict_all(cards, operators, moved)
        own = before["source"] == source
        pd.testing.assert_series_equal(after.loc[own, "predicted"], before.loc[own, "predicted"])


def test_the_interval_holds_its_share_of_the_published_points() -> None:
    check = (A10G.calibration or {})["check"]
    points = pd.read_csv(calibrate_a10g.ERRORS).dropna(subset="predicted")
    assert len(points) == check["points"]
    assert points["published"].between(points["low"], points["high"]).mean() >= check["interval_share"]
    assert points["relative_error"].abs().median() == pytest.approx(check["median_error"], abs=1e-4)


def test_every_point_is_predicted_or_says_why_not() -> None:
    points = pd.read_csv(calibrate_a10g.ERRORS)
    assert (points["predicted"].isna() == points["why_not"].notna()).all()


@pytest.mark.parametrize(
    "path", sorted(shipped("latency_models").glob("*/device.json")), ids=lambda path: path.parent.name
)
def test_every_shipped_device_is_found_and_can_be_estimated(path: Path, micro: SearchSpace) -> None:
    device = find_device(path.parent.name)
    for dtype in ("bf16", "fp32"):
        assert RooflineLatency(device, micro.shape, dtype).layer_ms("decode", 1, 8, 16) > 0


def test_a_layers_elementwise_kernels_move_what_their_tensors_hold(micro: SearchSpace) -> None:
    """Each tensor of hidden size 32 that a norm, a residual, the rotation or SwiGLU reads or writes, one by one."""
    norms = (32 + 32) * 2
    residuals = (32 + 32 + 32) * 2
    rotation = (4 * 8 + 4 * 8) + (2 * 8 + 2 * 8)  # queries of 4 heads and keys of 2, read and written
    swiglu = 256 + 256 + 256
    assert elementwise_values(micro.shape.layer(2)) == norms + residuals + rotation + swiglu == 1184
