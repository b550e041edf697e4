"""Latency: tables against closed forms, timing side by side, devices with and without NVML."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pynvml
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.config import MeasureConfig, WorkloadConfig
from nas.errors import UserError
from nas.latency import Device, Workload, decode_ms, prefill_ms, resolve_workload, this_device
from nas.latency.measure import LayerPool, grid_for, measure, predict_check, summarise_check
from nas.latency.table import COLUMNS, TableLatency, layer_shape, summarise
from nas.latency.timing import time_side_by_side
from nas.model.decoder import Decoder, attend_packed
from nas.resources import shipped
from nas.space import SearchSpace, load_space

WORKLOAD = Workload(batch=4, context=16, prompt=8, dtype="fp32", runtime="eager")
GPU = Device("nvidia-x", "NVIDIA X", True, 2**34, bandwidth_bytes_per_s=1e12, flops={"fp32": 1e14})


def bilinear(groups: int, batch: float, length: float) -> float:
    return 0.5 + 0.1 * batch + 0.01 * groups * batch * length


def write_table(folder: Path, micro: SearchSpace, **changes: Any) -> Path:
    """A table whose times are exactly bilinear, for a device called box."""
    folder.mkdir(exist_ok=True)
    rows = [
        (phase, "layer" if groups else "ends", groups, batch, length, bilinear(groups, batch, length), 0, 0, 3)
        for phase in ("decode", "prefill")
        for groups in (0, 1, 2, 4)
        for batch in (2, 6)
        for length in (4, 20, 32)
    ]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(folder / "table.csv", index=False)
    meta = {
        "date": "2026-01-02T03:04:05",
        "device": {"slug": "box", "name": "Box"},
        "dtype": "fp32",
        "runtime": "eager",
    }
    error = {"n": 3, "mape": 0.012, "worst": 0.02, "kendall_tau": 1.0}
    meta |= {"shape": layer_shape(micro.shape), "check": {"decode": error, "prefill": {**error, "mape": 0.03}}}
    meta |= {"workload": {"batch": 4, "context": 16, "prompt": 8}}
    (folder / "latency.json").write_text(json.dumps(meta | changes))
    return folder


@given(st.floats(2, 6), st.floats(4, 32), st.sampled_from([1, 2, 4]))
@settings(max_examples=50)
def test_interpolation_is_exact_for_bilinear_times(batch: float, length: float, groups: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = TableLatency(write_table(Path(folder), load_space("tiny")))
    assert table.layer_ms("decode", groups, batch, length) == pytest.approx(bilinear(groups, batch, length))  # type: ignore[arg-type]


def test_a_vector_costs_the_sum_of_its_layers_and_the_ends(micro: SearchSpace, tmp_path: Path) -> None:
    table = TableLatency(write_table(tmp_path, micro))
    layers = sum(bilinear(groups, 4, 16) for groups in (4, 1, 1))
    assert decode_ms(table, (4, 1, 1), WORKLOAD) == pytest.approx(layers + bilinear(0, 4, 16))
    layers = sum(bilinear(groups, 4, 8) for groups in (4, 1, 1))
    assert prefill_ms(table, (4, 1, 1), WORKLOAD) == pytest.approx(layers + bilinear(0, 4, 8))


@pytest.mark.parametrize(("batch", "length"), [(1, 16), (7, 16), (4, 3), (4, 33)])
def test_nothing_is_said_outside_the_grid(micro: SearchSpace, tmp_path: Path, batch: int, length: int) -> None:
    table = TableLatency(write_table(tmp_path, micro))
    with pytest.raises(UserError, match="covers batch 2 to 6 and length 4 to 32"):
        table.layer_ms("decode", 1, batch, length)


def test_a_table_fits_only_its_own_device_shape_and_workload(micro: SearchSpace, tmp_path: Path) -> None:
    table = TableLatency(write_table(tmp_path, micro))
    assert table.fits("box", micro, WORKLOAD)
    assert not table.fits("other", micro, WORKLOAD)
    assert not table.fits("box", load_space("tiny"), WORKLOAD)
    assert not table.fits("box", micro, Workload(64, 16, 8, "fp32", "eager"))
    assert not table.fits("box", micro, Workload(4, 16, 8, "bf16", "eager"))
    assert not table.fits(
        "box", SearchSpace("m", micro.shape, ((1, 4),) * 2 + ((1,),)), Workload(4, 16, 2, "fp32", "eager")
    )


def test_a_table_says_where_its_numbers_come_from(micro: SearchSpace, tmp_path: Path) -> None:
    words = TableLatency(write_table(tmp_path, micro)).describe()
    assert words == (
        "measured on Box on 2026-01-02; mean error decode 1.2%, prefill 3.0% over 3 whole models at batch 4, "
        "context 16, prompt 8"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text.replace("median_ms", "time"),
        lambda text: text.replace(",0.7,", ",-0.7,", 1),
        lambda text: "\n".join(text.splitlines()[:-1]),
        lambda text: '"' + text,
    ],
)
def test_a_corrupt_table_is_one_sentence(micro: SearchSpace, tmp_path: Path, damage: Any) -> None:
    file = write_table(tmp_path, micro) / "table.csv"
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=r"table\.csv"):
        TableLatency(tmp_path)


def test_a_table_whose_meaning_is_incomplete_is_one_sentence(micro: SearchSpace, tmp_path: Path) -> None:
    file = write_table(tmp_path, micro) / "latency.json"
    meta = json.loads(file.read_text())
    del meta["workload"], meta["dtype"]
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"latency\.json is corrupt \(it lacks dtype, workload\)"):
        TableLatency(tmp_path)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_packed_decode_attention_equals_attention_over_repeated_heads(groups: int, batch: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, 8, 1, 16, generator=generator)
    k, v = (torch.randn(batch, groups, length, 16, generator=generator) for _ in range(2))
    every_k, every_v = (x.repeat_interleave(8 // groups, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, every_k, every_v)
    torch.testing.assert_close(attend_packed(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_timing_side_by_side_tells_slow_from_fast() -> None:
    work = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.004)}
    samples = time_side_by_side(work, 5, 0, torch.device("cpu"), False, "")
    assert {key: len(seconds) for key, seconds in samples.items()} == {"slow": 5, "fast": 5}
    assert min(samples["slow"]) >= 0.02
    assert np.median(samples["fast"]) < np.median(samples["slow"])


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=30))
def test_summaries_are_percentiles_in_milliseconds(seconds: list[float]) -> None:
    summary = summarise(seconds)
    assert summary["n"] == len(seconds)
    assert summary["median_ms"] == pytest.approx(1e3 * float(np.median(seconds)))
    assert summary["p20_ms"] <= summary["median_ms"] <= summary["p80_ms"]


def test_a_measurement_covers_the_grid_and_checks_whole_models(micro: SearchSpace, tmp_path: Path) -> None:
    config = MeasureConfig(batches=[3], contexts=[8], rounds=3)
    grid = grid_for(config, WORKLOAD)
    assert (grid.batches, grid.contexts, grid.prompts) == ((3, 4), (8, 16), (4, 8))
    table, wholes = measure(micro, grid, WORKLOAD, config, 5, torch.device("cpu"))
    assert len(table) == 2 * 2 * 2 * 4  # phases, batches, lengths, three groups and the ends
    assert (table["median_ms"] > 0).all()
    folder = write_table(tmp_path, micro)
    table.to_csv(folder / "table.csv", index=False)
    check = predict_check(wholes, TableLatency(folder), WORKLOAD)
    vectors = {vector for vector in check["vector"]}
    assert len(check) == 2 * len(vectors) >= 6
    assert (check["predicted_ms"] > 0).all()


def test_a_layer_is_timed_as_a_share_of_all_layers_and_a_whole_model_as_it_is(
    micro: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(work: dict[Any, Any], rounds: int, *_: object) -> dict[Any, list[float]]:
        for call in work.values():
            call()
        seconds = {"layer": 0.3, "ends": 0.05, "whole": 7.0}
        return {key: [seconds[key[0]]] * rounds for key in work}

    monkeypatch.setattr("nas.latency.measure.time_side_by_side", fake)
    config = MeasureConfig(rounds=5)
    table, wholes = measure(micro, grid_for(config, WORKLOAD), WORKLOAD, config, 3, torch.device("cpu"))
    layers, ends = (table.loc[table["part"] == part, "median_ms"].to_numpy() for part in ("layer", "ends"))
    assert len(layers) == 3 * len(ends) > 0
    assert layers == pytest.approx(100.0)  # three layers took 0.3 s
    assert ends == pytest.approx(50.0)
    assert wholes["measured_ms"].tolist() == pytest.approx([7000.0] * len(wholes))


def test_whole_models_of_the_pool_compute_what_a_decoder_computes(micro: SearchSpace) -> None:
    pool = LayerPool(micro, grid_for(MeasureConfig(), WORKLOAD), WORKLOAD, torch.device("cpu"))
    vector = (4, 1, 2)
    model = Decoder(micro.shape, vector)
    model.load_state_dict(
        pool._models[1].state_dict()
        | {
            name: tensor
            for index, groups in enumerate(vector)
            for name, tensor in pool._models[groups].state_dict().items()
            if name.startswith(f"model.layers.{index}.")
        }
    )
    with torch.no_grad():
        logits = pool.whole("prefill", vector, 4, 8)()
        torch.testing.assert_close(logits, model(pool._tokens[:4, :8], last_only=True))


def test_check_summaries_measure_relative_errors_by_phase() -> None:
    rows = [("decode", "1", 1, 1, 10.0, 11.0), ("decode", "2", 1, 1, 20.0, 19.0), ("prefill", "1", 1, 1, 1.0, 9.0)]
    check = pd.DataFrame(rows, columns=["phase", "vector", "batch", "length", "measured_ms", "predicted_ms"])
    summary = summarise_check(check)
    assert summary["decode"] == pytest.approx({"n": 2, "mape": 0.075, "worst": 0.1, "kendall_tau": 1.0})
    assert summary["prefill"] == {"n": 1, "mape": pytest.approx(8.0), "worst": pytest.approx(8.0)}  # nothing to rank


def test_the_workload_takes_its_defaults_from_space_and_device(micro: SearchSpace) -> None:
    cpu = Device("cpu", "CPU", False, 1)
    assert resolve_workload(WorkloadConfig(), micro.shape, cpu) == Workload(64, 32, 16, "fp32", "eager")
    assert resolve_workload(WorkloadConfig(), micro.shape, GPU) == Workload(64, 32, 16, "bf16", "graph")


def test_this_machine_has_a_name_and_memory() -> None:
    device = this_device()
    assert device.slug
    assert device.slug == device.slug.lower()
    assert device.memory_bytes > 2**28


def test_a_failing_nvml_leaves_a_gpu_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError_LibraryNotFound()

    class Properties:
        name, total_memory, uuid = "NVIDIA Fake 9000", 123, "0"

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert this_device() == Device("nvidia-fake-9000", "NVIDIA Fake 9000", True, 123)


@pytest.mark.parametrize(
    "meta", sorted(shipped("latency_models").glob("*/*/latency.json")), ids=lambda path: path.parent.name
)
def test_every_shipped_table_loads_and_is_of_its_folders_device(meta: Path) -> None:
    table = TableLatency(meta.parent)
    assert table.meta["device"]["slug"] == meta.parent.parent.name
    errors = summarise_check(table.check())
    assert errors.keys() == table.meta["check"].keys() == {"decode", "prefill"}
    for phase, error in errors.items():
        assert error == pytest.approx(table.meta["check"][phase])
