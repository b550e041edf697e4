"""Latency: tables against closed forms, the grid and the points of a measurement, devices with and without NVML."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pynvml
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import shipped
from nas.config import ConstraintsConfig, CostConfig, MeasureConfig, Search, WorkloadConfig
from nas.errors import UserError
from nas.latency import Device, Workload, find_device, resolve_workload, this_device
from nas.latency.accuracy import (
    CHECK_COLUMNS,
    lasting_load,
    overall_errors,
    predict_end_to_end,
    random_vectors,
    summarise_check,
)
from nas.latency.cost import cost_function
from nas.latency.energy import ENERGY_COLUMNS
from nas.latency.estimate import RooflineLatency
from nas.latency.measurement import Grid, check_shapes, grid_for
from nas.latency.predictor import PARTS, PHASES, STEP_REVISION, Phase, Point
from nas.latency.table import COLUMNS, OK, OUT_OF_MEMORY, TableLatency, layer_shape, summarise
from nas.metrics import COLUMNS as METRIC_COLUMNS
from nas.metrics import LIMITS, METRICS, OBJECTIVES
from nas.run import start_run
from nas.serving.batching import PREFILL_TOKENS, prefill_chunks
from nas.space import SearchSpace, load_space, parse_vector
from nas.stages.measure import find_latency

WORKLOAD = Workload(batch=4, context=16, prompt=8, dtype="fp32", runtime="eager")
BOX, CPU = Device("box", "Box", False, 2**33), Device("cpu", "CPU", False, 2**33)
GPU = Device("nvidia-x", "NVIDIA X", True, 2**34, bandwidth_bytes_per_s=1e12, flops={"fp32": 1e14})
GRID = Grid(batches=(2, 3, 6), contexts=(4, 20, 32), prompts=(4, 8, 16))
CHUNKS = [(batch, prompt) for prompt in GRID.prompts for batch in (1, 3, 6)]  # what is measured of prefill
CORNER = ("decode", 6, 32)
GROUPS = (1, 2, 4)
DECODE = {"phase": "decode", "batch": 4, "length": 16, "n": 3, "mape": 0.01, "worst": 0.02, "kendall_tau": 1.0}
Times = Callable[[Point], float]
Make = Callable[..., TableLatency]


def affine(point: Point, a: float = 0.5, b: float = 0.1, c: float = 0.01) -> float:
    """Times that grow with the bytes of a decode step, and with the operations of a prefill chunk."""
    groups = sum(point.groups)
    if point.phase == "decode":
        return a + b * point.batch + c * groups * point.batch * point.length
    return point.batch * point.length * (a * (1 + groups) + b * point.length)


def table_points() -> list[Point]:
    points = [Point("decode", "layer", (g,), batch, length) for g in GROUPS for batch, length in GRID.shapes("decode")]
    points += [Point("prefill", "layer", (g,), *shape) for g in GROUPS for shape in CHUNKS]
    points += [Point("decode", part, (), batch, 1) for part in ("embedding", "head") for batch in GRID.batches]
    return points + [Point("prefill", part, (), *shape) for part in ("embedding", "head") for shape in CHUNKS]


def write_table(
    folder: Path,
    space: SearchSpace,
    times: Times = affine,
    points: Iterable[Point] | None = None,
    lost: Iterable[tuple[str, int, int]] = (),
    **changes: Any,
) -> Path:
    """A table of given times for a device called box; ``lost`` shapes did not fit into memory."""
    folder.mkdir(exist_ok=True)
    rows = []
    for point in table_points() if points is None else points:
        fits = (point.phase, point.batch, point.length) not in set(lost)
        ms = times(point)
        rows.append([*point.row(), *((ms, ms, ms, 3, OK) if fits else (None, None, None, 0, OUT_OF_MEMORY))])
    pd.DataFrame(rows, columns=COLUMNS).to_csv(folder / "table.csv", index=False)
    elsewhere = DECODE | {"batch": 3, "length": 10, "mape": 0.02, "worst": 0.05}
    meta = {
        "date": "2026-01-02T03:04:05",
        "device": {"slug": "box", "name": "Box"},
        "dtype": "fp32",
        "runtime": "eager",
        "shape": layer_shape(space.shape),
        "check": [DECODE, elsewhere, DECODE | {"phase": "prefill", "length": 8, "mape": 0.03}],
        "workload": {"batch": 4, "context": 16, "prompt": 8},
    }
    (folder / "latency.json").write_text(json.dumps(meta | changes))
    return folder


@pytest.fixture
def make(micro: SearchSpace, tmp_path: Path) -> Make:
    """Makes a table of the micro space, in the test's folder."""
    return lambda **changes: TableLatency(write_table(tmp_path, micro, **changes))


def layer(phase: Phase, groups: int, batch: int, length: int) -> Point:
    return Point(phase, "layer", (groups,), batch, length)


def covered(phase: Phase, batch: int, length: int, corner_lost: bool) -> bool:
    """Whether measured points surround a decode step (batch, length), or a prefill chunk by its rows or tokens."""
    if phase == "decode":
        beyond = batch > 3 and length > 20 if corner_lost else False
        return 2 <= batch <= 6 and 4 <= length <= 32 and not beyond
    around = [prompt for prompt in GRID.prompts if prompt == length]
    around = around or [max(p for p in (0, *GRID.prompts) if p < length), *(p for p in GRID.prompts if p > length)][:2]
    return 4 <= length <= 16 and all(batch <= 6 or batch * length <= 6 * prompt for prompt in around)


@given(*[st.floats(1e-3, 10)] * 3, st.booleans())
@settings(max_examples=6, deadline=None)
def test_interpolation_is_exact_where_bytes_and_operations_are_and_says_nothing_outside(
    a: float, b: float, c: float, corner_lost: bool
) -> None:
    def times(point: Point) -> float:
        return affine(point, a, b, c)

    space = load_space("tiny")
    with tempfile.TemporaryDirectory() as folder:
        table = TableLatency(write_table(Path(folder), space, times, lost=[CORNER] if corner_lost else []))
    asked: list[tuple[Phase, int, int]] = [("decode", batch, length) for batch in range(1, 8) for length in (3, 34)]
    asked += [("decode", batch, length) for batch in range(1, 8) for length in range(4, 33, 4)]
    asked += [("prefill", batch, length) for batch in range(1, 8) for length in (3, 4, 5, 7, 8, 10, 15, 16, 17)]
    for phase, batch, length in asked:
        if covered(phase, batch, length, corner_lost):
            for groups in GROUPS:
                expected = times(layer(phase, groups, batch, length))
                assert table.layer_ms(phase, groups, batch, length) == pytest.approx(expected)
        else:
            with pytest.raises(UserError, match=rf"in {phase}, not batch {batch} and length {length}"):
                table.layer_ms(phase, 1, batch, length)


def test_between_points_only_the_nearest_ones_count(make: Make) -> None:
    rng = np.random.default_rng(0)
    drawn = {point: float(rng.uniform(1, 2)) for point in table_points()}
    table = make(times=drawn.__getitem__)
    for groups in GROUPS:
        for batch in (2, 3, 4, 5, 6):
            for length in (4, 5, 19, 20, 21, 32):
                of_batch = [
                    np.interp(length, GRID.contexts, [drawn[layer("decode", groups, b, at)] for at in GRID.contexts])
                    for b in GRID.batches
                ]
                expected = np.interp(batch, GRID.batches, of_batch)
                assert table.layer_ms("decode", groups, batch, length) == pytest.approx(expected)
        for length in (4, 6, 8, 11, 16):
            of_length = [
                np.interp(2 * length, [b * p for b in (1, 3, 6)], [drawn[layer("prefill", groups, b, p)] for b in BS])
                for p, BS in ((p, (1, 3, 6)) for p in GRID.prompts)
            ]
            expected = np.interp(length, GRID.prompts, of_length)
            assert table.layer_ms("prefill", groups, 2, length) == pytest.approx(expected)


@pytest.mark.parametrize(("taus", "ranks"), [([-0.14, 0.07], False), ([0.64, 0.93], True), ([], True)])
def test_a_table_that_ranks_nothing_is_refused(make: Make, taus: list[float], ranks: bool) -> None:
    table = make(check=[DECODE | {"n": 8, "kendall_tau": tau} for tau in taus])
    with nullcontext() if ranks else pytest.raises(UserError, match=r"ranks nothing: .* of 8 models is -0.04"):
        table.check_ranking()


def test_a_prompt_so_long_that_it_goes_alone_does_not_flatten_what_is_between(make: Make, micro: SearchSpace) -> None:
    workload = dataclasses.replace(WORKLOAD, context=8192, prompt=4096)
    grid = grid_for(MeasureConfig(), workload, [4], 8192)
    table = make(points=grid.points(micro))
    *_, (_, _, between) = check_shapes(MeasureConfig(), grid, workload, [4])
    assert between not in grid.prompts
    assert table.layer_ms("prefill", 1, 1, between) == pytest.approx(affine(layer("prefill", 1, 1, between)))


def test_a_table_without_a_number_of_groups_says_so(make: Make) -> None:
    table = make(points=[point for point in table_points() if point.groups != (2,)])
    with pytest.raises(UserError, match="no decode times for 2 groups; measure this space"):
        table.layer_ms("decode", 2, 4, 16)


def test_a_vector_costs_the_sum_of_its_layers_and_embedding_and_head(make: Make) -> None:
    table = make()
    layers = sum(affine(layer("decode", groups, 4, 16)) for groups in (4, 1, 1))
    assert table.decode_ms((4, 1, 1), 4, 16) == pytest.approx(layers + 2 * affine(Point("decode", "head", (), 4, 1)))
    layers = sum(affine(layer("prefill", groups, 4, 8)) for groups in (4, 1, 1))
    embedding_and_head = 2 * affine(Point("prefill", "head", (), 4, 8))
    assert table.prefill_ms((4, 1, 1), 4, 8) == pytest.approx(layers + embedding_and_head)
    assert table.decode_ms((4, 1, 1), 4, 16) == table.decode_ms((1, 4, 1), 4, 16)  # to the last bit


@given(st.integers(1, 3000), st.integers(1, 2 * PREFILL_TOKENS))
def test_prefill_chunks_cover_the_batch_and_are_as_few_as_their_tokens_allow(batch: int, prompt: int) -> None:
    parts = prefill_chunks(batch, prompt)
    assert sum(parts) == batch
    assert min(parts) >= 1
    assert parts == sorted(parts, reverse=True)
    assert all(rows * prompt <= PREFILL_TOKENS or rows == 1 for rows in parts)
    assert len(parts) == 1 or (parts[0] + 1) * prompt > PREFILL_TOKENS


def test_time_to_first_token_is_the_prefill_of_one_prompt(make: Make, micro: SearchSpace) -> None:
    table, vector = make(), (4, 1, 2)
    costs = cost_function(micro, BOX, table, WORKLOAD, CostConfig(), ["ttft_ms", "loss_nats"])(vector)
    one_prompt = sum(affine(layer("prefill", groups, 1, 8)) for groups in vector)
    one_prompt += 2 * affine(Point("prefill", "head", (), 1, 8))
    assert costs["ttft_ms"] == pytest.approx(one_prompt)
    assert costs["prefill_ms"] == pytest.approx(table.prefill_ms(vector, 4, 8)) != costs["ttft_ms"]
    assert costs["latency_source"] == "measured"

    table = make(points=[point for point in table_points() if (point.phase, point.batch) != ("prefill", 1)])
    costs = cost_function(micro, BOX, table, WORKLOAD, CostConfig())(vector)
    assert "ttft_ms" not in costs
    assert costs["prefill_ms"] == pytest.approx(table.prefill_ms(vector, 4, 8))
    with pytest.raises(UserError, match=r"ttft_ms is wanted, but .* does not tell it for batch 4.*; measure that"):
        cost_function(micro, BOX, table, WORKLOAD, CostConfig(), ["loss_nats", "ttft_ms"])


def test_every_metric_of_the_registry_is_predicted_where_its_inputs_are_known(
    micro: SearchSpace, tmp_path: Path
) -> None:
    loads = [{"groups": 2, "batch": 4, "length": 16, "ratio": 1.5}]
    write_table(tmp_path, micro, idle_watts=50.0, runtime="graph", lasting_load=loads)
    power = [(g, batch, 16, 100.0 * g, 1.0, 5.0, 9, "energy counter") for g in GROUPS for batch in (2, 6)]
    pd.DataFrame(power, columns=ENERGY_COLUMNS).to_csv(tmp_path / "energy.csv", index=False)
    table, cost = TableLatency(tmp_path), CostConfig(price_per_hour=1.0)
    assert table.decode_ms((4, 1, 2), 4, 16) > table.forward_ms("decode", (4, 1, 2), 4, 16)
    costs = cost_function(micro, BOX, table, WORKLOAD, cost)((4, 1, 2))
    interval = {"decode_ms_low", "decode_ms_high"}  # of estimates
    assert costs.keys() == METRICS.keys() - {"loss_nats", "paired_se_nats"} - interval | {"latency_source"}
    joules = sum(100.0 * groups * table.layer_share_ms(groups, 4, 16, 3) / 1e3 for groups in (4, 1, 2))
    assert costs["joules_per_token"] == pytest.approx(joules / 4)
    estimated = cost_function(micro, GPU, RooflineLatency(GPU, micro.shape, "fp32"), WORKLOAD, CostConfig())((1, 1, 1))
    assert interval < estimated.keys()
    assert estimated["latency_source"] == "estimated"
    assert "joules_per_token" not in estimated


def test_columns_objectives_and_limits_are_the_contracts() -> None:
    costs = "decode_ms prefill_ms tokens_per_s batch kv_bytes_per_token parameters"
    assert " ".join(METRIC_COLUMNS) == f"vector loss_nats {costs} on_front latency_source"
    keys = "max_decode_ms max_prefill_ms min_tokens_per_s max_kv_bytes_per_token max_parameters max_memory_gib"
    assert list(LIMITS) == [*keys.split(), "max_ttft_ms"]
    assert [field.name for field in dataclasses.fields(ConstraintsConfig)] == list(LIMITS)
    assert set(OBJECTIVES) == {*METRIC_COLUMNS[1:8], "ttft_ms"} - {"batch"}
    assert METRICS["prefill_ms"].label == "prefill (ms)"
    assert METRICS["parameters"].label == "parameters"


def test_prompts_go_through_in_chunks_whose_times_add_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    table, third, asked = make(), PREFILL_TOKENS // 3, set[Any]()

    def embedding_and_head_ms(phase: Phase, batch: int, length: int) -> float:
        asked.add((phase, batch, length))
        return math.sqrt(batch)

    monkeypatch.setattr(table, "layer_ms", lambda phase, groups, batch, at: groups * batch**2 + at + len(phase))
    monkeypatch.setattr(table, "embedding_and_head_ms", embedding_and_head_ms)
    assert prefill_chunks(8, third) == [3, 3, 2]
    one, two = (3 * (2 * rows**2) + 3 * (third + len("prefill")) + math.sqrt(rows) for rows in (3, 2))
    assert table.prefill_ms((1, 2, 3), 8, third) == pytest.approx(2 * one + two)
    assert asked == {("prefill", 3, third), ("prefill", 2, third)}
    long = 2 * PREFILL_TOKENS
    assert table.prefill_ms((1,), 3, long) == pytest.approx(3 * table.prefill_ms((1,), 1, long))


def test_a_table_fits_only_its_own_device_shape_and_workload(make: Make, micro: SearchSpace) -> None:
    table = make()

    def fits(batches: Iterable[int] = (4,), device: str = "box", space: SearchSpace = micro, **changes: Any) -> bool:
        return table.fits(device, space, dataclasses.replace(WORKLOAD, **changes), batches)

    assert fits()
    assert fits((2, 6))
    assert not fits((4, 7))
    assert not fits((1, 4))
    assert not fits(device="other")
    assert not fits(space=load_space("tiny"))
    for other in ({"context": 33}, {"prompt": 2}, {"dtype": "bf16"}, {"runtime": "graph"}, {"engine": "tgi"}):
        assert not fits(**other)
    fewer = make(points=[point for point in table_points() if point.groups != (2,)])
    assert not fewer.fits("box", micro, WORKLOAD, [4])
    assert fewer.fits("box", SearchSpace("m", micro.shape, ((1, 4),) * 2 + ((1,),)), WORKLOAD, [4])
    ragged = make(lost=[CORNER])
    beyond = dataclasses.replace(WORKLOAD, context=32)
    assert ragged.fits("box", micro, beyond, [3])
    assert not ragged.fits("box", micro, beyond, [3, 6])


def test_a_table_says_where_its_numbers_come_from(make: Make) -> None:
    assert make().description == (
        "measured on Box on 2026-01-02; mean error of decode 1.5%, worst 5.0% (3 end-to-end models at 4 x 16, 3 x 10 "
        "tokens); mean error of prefill 3.0%, worst 2.0% (3 end-to-end models at 4 x 8 tokens)"
    )
    unchecked = make(check=[]).description
    assert unchecked == "measured on Box on 2026-01-02"
    loads = [{"groups": groups, "batch": 4, "length": 16, "ratio": ratio} for groups, ratio in ((1, 1.046), (4, 0.99))]
    assert make(check=[], lasting_load=loads).description == unchecked  # of eager steps
    drift = {"segments": 20, "segments_beyond": 11, "worst": 0.234}
    shaken = make(check=[], drift=drift)
    assert shaken.description == f"{unchecked}; the machine drifted in 11 of 20 segments, by up to 23%"
    assert make(check=[], drift=drift | {"segments_beyond": 10}).description == unchecked
    now = STEP_REVISION["graph"]
    changes: dict[str, Any] = {"check": [], "lasting_load": loads, "runtime": "graph", "step_revision": now}
    slower = "decode steps are those of a lasting load, which took up to 4.6% longer"
    assert make(**changes).description == f"{unchecked}; {slower}"
    changes["lasting_load"] = [{**loads[0], "ratio": 1.004}]
    assert make(**changes).description == unchecked
    for before in (now - 1, 1):
        old = make(**(changes | {"step_revision": before}))
        caution = "decode steps were of an earlier version of this software, so may be off by a tenth at few rows"
        assert old.description == f"{unchecked}; {caution}"
    del changes["step_revision"]
    assert "an earlier version" in make(**changes).description


@pytest.fixture
def plant(micro: SearchSpace, tmp_path: Path) -> Callable[..., Path]:
    """Makes a finished measurement of so many times the times of `affine`, on a machine that drifted or not."""

    def planted(path: Path | str, factor: float, drifting: bool, **changes: Any) -> Path:
        path = tmp_path / "measure" / path
        with start_run(path, "measure", {"device": "box"}) as run:
            drift = {"segments": 3, "segments_beyond": 2 if drifting else 1, "worst": 0.3}
            write_table(path, micro, lambda point: factor * affine(point), drift=drift, **changes)
            pd.DataFrame(columns=CHECK_COLUMNS).to_csv(path / "check.csv", index=False)
            run.finish()
        return path

    return planted


@pytest.fixture
def measured() -> list[Path]:
    """Where `find` measured."""
    return []


@pytest.fixture
def find(
    micro: SearchSpace,
    tmp_path: Path,
    plant: Callable[..., Path],
    measured: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path | None]:
    """The folder of the table that a search takes. If it measures, the machine drifts or not; None interrupts it."""

    def found(begun: Path | None = None, drifts: bool | None = True, **changes: Any) -> Path | None:
        def measure_space(*arguments: Any) -> None:
            measured.append(arguments[-1])
            if drifts is None:
                raise KeyboardInterrupt
            plant(arguments[-1], 10 + len(measured), drifts)

        monkeypatch.setattr("nas.stages.measure.measure_space", measure_space)
        config = Search(name="mine", runs_dir=str(tmp_path), data={}, sampler={}, **changes)
        recorded = {"latency_table": TableLatency(begun).digest} if begun else {}
        return find_latency(config, recorded, micro, BOX, WORKLOAD).folder

    return found


def test_an_estimate_says_that_the_tables_of_its_device_do_not_reach_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, device = load_space("decilm-6b"), find_device("nvidia-h100-80gb-hbm3")
    config = Search(name="s", runs_dir=str(tmp_path), data={}, sampler={}, device=device.slug)
    begun = {"latency_table": None}  # by an estimate
    for gib, earlier, source in ((21, {}, "measured"), (21, begun, "estimated"), (22.5, {}, "estimated")):
        workload = Workload("max", 2048, 1024, "bf16", "compiled", gib)
        assert find_latency(config, earlier, space, device, workload).source == source
        told = "No table of NVIDIA H100 80GB HBM3 covers batches 87 to 354" in " ".join(capsys.readouterr().err.split())
        assert told == (gib > 21)


def test_a_steady_table_is_taken_before_a_newer_one_whose_machine_drifted(
    plant: Callable[..., Path], find: Callable[..., Path], measured: list[Path]
) -> None:
    steady = plant("steady", 1, drifting=False)
    drifting = plant("drifting", 2, drifting=True)
    assert find() == find(device="box") == steady
    assert find(latency=str(drifting)) == find(begun=drifting) == drifting
    assert not measured


def test_while_the_machine_drifts_every_search_measures_again_and_takes_what_it_gets(
    find: Callable[..., Path], measured: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = find()
    assert "No measured table covers this space, device and workload: measuring first" in capsys.readouterr().out
    assert find(device="box") == first  # which is not at hand
    assert find(begun=first) == first
    assert not capsys.readouterr().out
    second, third = find(), find(drifts=False)
    what = "No table of a steady machine covers this space, device and workload"
    again = f"{what}: measuring again; latency=RUN takes one as it is"
    assert capsys.readouterr().out.splitlines() == [again, again]
    assert [first, second, third] == measured
    assert len(set(measured)) == 3
    assert find() == find(device="box") == third
    assert len(measured) == 3


def test_a_measurement_that_was_begun_again_is_resumed_and_shared(
    plant: Callable[..., Path], find: Callable[..., Path], measured: list[Path]
) -> None:
    for seed in (0, 1):  # of two searches
        with pytest.raises(KeyboardInterrupt):
            find(drifts=None, seed=seed)
    plant(measured[0], 1, drifting=True, check=[DECODE | {"n": 8, "kendall_tau": 0.0}])
    assert find() not in measured[:2]  # though the table there is passed over for its ranking, too
    assert measured[0] == measured[1] != measured[2]


def test_whoever_joins_a_study_late_takes_the_table_that_was_measured_for_it(
    plant: Callable[..., Path], find: Callable[..., Path], measured: list[Path]
) -> None:
    plant("drifting", 1, drifting=True)
    shared = find(storage="sqlite:///db")
    assert find(storage="sqlite:///db") == shared
    assert measured == [shared]


def test_an_end_to_end_model_is_no_check_where_memory_ended_for_its_layers(make: Make) -> None:
    table = make(lost=[CORNER])
    known, beyond = (Point("decode", "whole", (1, 2, 4), batch, 25) for batch in (3, 5))
    check = predict_end_to_end({known: 1.0, beyond: 2.0}, table)
    assert check[["batch", "measured_ms", "predicted_ms"]].to_numpy().tolist() == [
        [3, 1.0, table.forward_ms("decode", (1, 2, 4), 3, 25)]
    ]


def test_decode_steps_are_predicted_as_a_lasting_load_takes_them(make: Make) -> None:
    measured_ratios = ((1, 6, 1.2), (1, 4, 1.1), (4, 4, 0.9))
    loads = [{"groups": g, "batch": batch, "length": 16, "ratio": ratio} for g, batch, ratio in measured_ratios]
    table = make(runtime="graph", lasting_load=loads)
    for batch, factor in ((3, 1.1), (4, 1.1), (5, 1.15), (6, 1.2)):
        at = batch, 16
        uniform, largest = (3 * (groups,) for groups in (1, 4))
        short = {vector: table.forward_ms("decode", vector, *at) for vector in (uniform, largest, (2, 2, 2))}
        assert table.decode_ms(uniform, *at) == pytest.approx(factor * short[uniform])
        assert table.decode_ms((2, 2, 2), *at) == pytest.approx(short[2, 2, 2])  # of which nothing is known
        mixed = (factor * short[uniform] + 0.9 * short[largest] + short[2, 2, 2]) / 3
        assert table.decode_ms((4, 1, 2), *at) == pytest.approx(mixed)
        assert table.decode_ms((1, 2, 4), *at) == table.decode_ms((4, 1, 2), *at)  # to the last bit
    eager = make(runtime="eager", lasting_load=loads)
    assert eager.decode_ms((1, 1, 1), 4, 16) == pytest.approx(eager.forward_ms("decode", (1, 1, 1), 4, 16))


def test_a_lasting_load_is_set_beside_the_prediction_of_the_same_steps_if_they_were_measured(make: Make) -> None:
    batch, length = GRID.batches[-1], GRID.contexts[-1]
    earlier = [{"groups": 2, "batch": batch, "length": length, "ratio": 1.3}]  # of which the ratio must not depend
    table = make(runtime="graph", lasting_load=earlier)
    predicted = 3 * table.layer_ms("decode", 2, batch, length) + table.embedding_and_head_ms("decode", batch, length)
    where = {"groups": 2, "batch": batch, "length": length}
    known = where | {"watts": 9.0, "joules_per_step": 1.0, "seconds": 50 * 1.05 * predicted / 1e3, "calls": 50}
    energy = pd.DataFrame([known, known | {"batch": batch - 1}, known | {"groups": 8}])
    points = pd.read_csv(table.folder / "table.csv")
    assert lasting_load(energy, points, table, 3) == [where | {"ratio": 1.05}]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: "", "valid CSV"),
        (lambda text: text.replace("median_ms", "time"), "lacks the column median_ms"),
        (lambda text: text.replace(",status", "", 1), "status"),
        (lambda text: text.replace("\ndecode,layer,1,2,4,", "\ndecode,layer,1,2,4,-", 1), "row 2: .*positive"),
        (lambda text: text.replace("\ndecode,layer,1,2,20,", "\ndecode,layer,1,2,20,x", 1), "row 3: .*positive"),
        (lambda text: text + text.splitlines()[1] + "\n", "row .*there twice"),
        (lambda text: text + text.splitlines()[-1] + "\n", "row .*there twice"),
        (lambda text: ",".join(text.rstrip().split(",")[:-5]) + "\n", "positive"),
        (lambda text: '"' + text, "valid CSV"),
    ],
    ids=["empty", "no-time", "no-status", "negative", "word", "twice", "twice-in-prefill", "cut", "quote"],
)
def test_a_corrupt_table_is_one_sentence(
    micro: SearchSpace, tmp_path: Path, damage: Callable[[str], str], words: str
) -> None:
    file = write_table(tmp_path, micro, lost=[CORNER]) / "table.csv"
    text = file.read_text()
    file.write_text(damage(text))
    assert file.read_text() != text
    with pytest.raises(UserError, match=rf"table\.csv.*{words}") as refusal:
        TableLatency(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "wrong", [{"device": {"name": "Box"}}, {"date": 20260102}, {"check": None}, {"step_revision": "new"}]
)
def test_a_table_whose_meaning_is_incomplete_is_one_sentence(make: Make, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"latency\.json is corrupt \(.*\); restore it or measure again"):
        make(**wrong)


@pytest.mark.parametrize(
    ("column", "value"),
    [("groups", 2.5), ("groups", None), ("batch", 1.5), ("batch", "two"), ("median_ms", math.inf), ("median_ms", None)],
)
def test_a_row_that_no_measurement_writes_is_one_sentence(
    micro: SearchSpace, tmp_path: Path, column: str, value: Any
) -> None:
    file = write_table(tmp_path, micro) / "table.csv"
    table = pd.read_csv(file).astype({column: object})
    table.loc[3, column] = value
    table.to_csv(file, index=False)
    with pytest.raises(UserError, match=r"table\.csv is corrupt \(row 5"):
        TableLatency(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("is_gpu", None, "'is_gpu'"),
        ("memory_bytes", "much", "must be positive numbers"),
        ("bandwidth_bytes_per_s", -1, "must be positive numbers"),
        ("flops", 7, "values"),
    ],
)
def test_a_device_that_is_described_wrongly_is_one_sentence(
    micro: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "latency_models" / "mine"
    folder.mkdir(parents=True)
    values = find_device("nvidia-a10g").description() | {key: value}
    (folder / "device.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(UserError, match=rf"device\.json .*corrupt \(.*{words}"):
        RooflineLatency(find_device("mine"), micro.shape, "bf16")


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=30))
def test_summaries_are_percentiles(times_ms: list[float]) -> None:
    summary = summarise(times_ms)
    assert list(summary) == COLUMNS[5:]
    assert (summary["n"], summary["status"]) == (len(times_ms), "ok")
    assert summary["median_ms"] == pytest.approx(float(np.median(times_ms)))
    assert min(times_ms) <= summary["p20_ms"] <= summary["median_ms"] <= summary["p80_ms"] <= max(times_ms)


def test_a_summary_of_what_did_not_fit_has_no_times() -> None:
    summary = summarise([math.inf])
    assert (summary["n"], summary["status"]) == (0, "out_of_memory")
    assert all(math.isnan(summary[key]) for key in ("median_ms", "p20_ms", "p80_ms"))
    assert summarise([1.0, 3.0, math.inf])["median_ms"] == 2.0  # it fits where nothing else took the memory


sizes = st.integers(1, 300)
vectors = {"layer": st.tuples(sizes), "whole": st.lists(st.integers(1, 64), min_size=1, max_size=40).map(tuple)}
points = st.one_of(
    [
        st.builds(Point, st.sampled_from(PHASES), st.just(part), vectors.get(part, st.just(())), sizes, sizes)
        for part in PARTS
    ]
)


@given(st.lists(points, min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_a_point_comes_back_from_a_csv_as_it_was(some: list[Point]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame([point.row() for point in some], columns=COLUMNS[:5]).to_csv(f"{folder}/points.csv", index=False)
        frame = pd.read_csv(f"{folder}/points.csv")
    assert [Point.of_row(*row) for row in frame.itertuples(index=False)] == some


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Workload, list[int], MeasureConfig, int]:
    """A workload in a context, the smallest and the largest batch of it, and a grid that is asked for or not."""
    limit = draw(st.sampled_from([2, 32, 500, 8192]))
    lengths = st.integers(1, limit)
    some = sorted(set(draw(st.lists(st.integers(1, 512), min_size=1, max_size=2))))
    workload = Workload("max" if len(some) > 1 else some[0], draw(lengths), draw(lengths), "fp32", "eager")
    given_batches = draw(st.none() | st.lists(st.integers(1, 512), min_size=1, max_size=3))
    contexts, prompts = (draw(st.none() | st.lists(lengths, min_size=1, max_size=3)) for _ in range(2))
    return workload, some, MeasureConfig(batches=given_batches, contexts=contexts, prompts=prompts), limit


@given(workloads())
@settings(max_examples=15, deadline=None)
def test_a_table_of_the_grid_covers_the_workload_that_it_was_made_for(
    micro: SearchSpace, asked: tuple[Workload, list[int], MeasureConfig, int]
) -> None:
    workload, some, config, limit = asked
    grid = grid_for(config, workload, some, limit)
    for name, axis in dataclasses.asdict(grid).items():
        assert len(axis) >= 2
        assert list(axis) == sorted(set(axis))
        assert set(getattr(config, name) or ()) <= set(axis)
    assert 1 <= min(*grid.contexts, *grid.prompts) <= max(*grid.contexts, *grid.prompts) <= limit
    timed = grid.points(micro)
    assert len(timed) == len(set(timed))
    assert all(point.length == 1 for point in timed if point.phase == "decode" and point.part != "layer")
    assert all(p.batch * p.length <= PREFILL_TOKENS or p.batch == 1 for p in timed if p.phase == "prefill")
    with tempfile.TemporaryDirectory() as folder:
        table = TableLatency(write_table(Path(folder), micro, points=timed))
    assert table.fits("box", micro, workload, some)
    for batch in some:
        step = sum(affine(layer("decode", g, batch, workload.context)) for g in (1, 2, 4))
        step += 2 * affine(Point("decode", "head", (), batch, 1))
        assert table.decode_ms((4, 1, 2), batch, workload.context) == pytest.approx(step)


def test_the_grid_is_what_was_asked_for_and_the_workload() -> None:
    config = MeasureConfig(batches=[3], contexts=[8], rounds=3)
    assert grid_for(config, WORKLOAD, [4], 32) == Grid((3, 4), (8, 16), (4, 8))
    assert grid_for(MeasureConfig(), WORKLOAD, [4], 32) == Grid((1, 2, 4), (4, 8, 16), (4, 8))
    assert grid_for(MeasureConfig(batches=[4]), WORKLOAD, [4], 32).batches == (2, 4)
    assert grid_for(MeasureConfig(), dataclasses.replace(WORKLOAD, batch="max"), [3, 40], 32).batches == (3, 20, 40)
    assert grid_for(MeasureConfig(), dataclasses.replace(WORKLOAD, context=1, prompt=1), [1], 32) == Grid(
        (1, 2), (1, 2), (1, 2)
    )


@given(st.integers(1, 512), st.integers(4, 8192), st.integers(1, 8192))
def test_the_check_is_at_the_workload_and_off_the_grid(batch: int, context: int, prompt: int) -> None:
    workload = Workload(batch, context, prompt, "fp32", "eager")
    grid = grid_for(MeasureConfig(), workload, [batch], 8192)
    shapes = check_shapes(MeasureConfig(), grid, workload, [batch])
    assert len(shapes) == len(set(shapes))
    assert {("decode", batch, context), ("prefill", prefill_chunks(batch, prompt)[0], prompt)} <= set(shapes)
    off = [shape for shape in shapes if shape[1:] not in set(grid.shapes(shape[0]))]
    assert any(phase == "decode" for phase, _, _ in off)
    if prompt >= 3:
        assert any(phase == "prefill" for phase, _, _ in off)
    for phase, rows, length in shapes:
        axis = grid.contexts if phase == "decode" else grid.prompts
        assert axis[0] <= length <= axis[-1]
        assert rows <= batch


def test_the_check_goes_where_it_is_told() -> None:
    config = MeasureConfig(check_at=[[3, 10], [2, 16], [4, 7]])
    shapes = check_shapes(config, grid_for(config, WORKLOAD, [2, 4], 32), WORKLOAD, [2, 4])
    assert shapes == [("decode", 2, 16), ("decode", 3, 10), ("decode", 4, 7), ("prefill", 2, 8)]


def test_the_check_is_at_batches_that_every_vector_has() -> None:
    workload = dataclasses.replace(WORKLOAD, batch="max")
    grid = grid_for(MeasureConfig(), workload, [8, 40], 32)
    assert grid.batches == (8, 20, 40)
    assert {batch for phase, batch, _ in check_shapes(MeasureConfig(), grid, workload, [8, 40])} == {8}


@given(st.integers(0, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_vectors_of_a_check_are_distinct_of_the_space_and_drawn_by_the_seed(
    micro: SearchSpace, count: int, seed: int
) -> None:
    space = SearchSpace("m", micro.shape, ((1, 4), (2,), (1, 2, 4)))
    vectors = random_vectors(space, count, seed)
    assert len(vectors) == len(set(vectors)) == min(count, space.size)
    assert all(space.check(vector) == vector for vector in vectors)
    assert vectors == random_vectors(space, count, seed)


def test_another_seed_checks_other_vectors() -> None:
    space = load_space("tiny")
    drawn = [random_vectors(space, 6, seed) for seed in range(4)]
    assert len({tuple(vectors) for vectors in drawn}) == 4


def test_check_summaries_measure_relative_errors_by_workload() -> None:
    rows = [
        ("decode", "1", 4, 8, 10.0, 11.0),
        ("decode", "2", 4, 8, 20.0, 19.0),
        ("decode", "4", 4, 8, 30.0, 15.0),
        ("prefill", "1", 1, 8, 1.0, 9.0),
        ("decode", "1", 4, 16, 10.0, 10.0),
        ("decode", "2", 4, 16, 20.0, 10.0),
    ]
    later, sooner, prefill = (
        {"phase": "decode", "batch": 4, "length": 16, "n": 2, "mape": 0.25, "worst": 0.5},  # predictions tie: no rank
        {"phase": "decode", "batch": 4, "length": 8, "n": 3, "mape": 0.65 / 3, "worst": 0.5, "kendall_tau": 1 / 3},
        {"phase": "prefill", "batch": 1, "length": 8, "n": 1, "mape": 8.0, "worst": 8.0},  # nothing to rank
    )
    summaries = summarise_check(pd.DataFrame(rows, columns=CHECK_COLUMNS))
    assert [summary.keys() for summary in summaries] == [sooner.keys(), later.keys(), prefill.keys()]
    for summary, expected in zip(summaries, (sooner, later, prefill), strict=True):
        assert summary == {key: pytest.approx(value) for key, value in expected.items()}
    assert overall_errors(summaries[:2]) == pytest.approx(((0.65 + 0.5) / 5, 0.5))


def test_the_workload_takes_its_defaults_from_space_and_device(micro: SearchSpace) -> None:
    assert resolve_workload(WorkloadConfig(), micro.shape, CPU) == Workload(64, 32, 16, "fp32", "eager")
    assert resolve_workload(WorkloadConfig(), micro.shape, GPU) == Workload(64, 32, 16, "bf16", "compiled")
    most = resolve_workload(WorkloadConfig(batch="max"), micro.shape, CPU)
    assert most == Workload("max", 32, 16, "fp32", "eager", memory_gib=4.0)  # half is left to other programs
    assert resolve_workload(WorkloadConfig(batch="max"), micro.shape, GPU).memory_gib == 15.25  # 16 GiB but CUDA's
    given_gib = WorkloadConfig(batch="max", context=1, memory_gib=0.5)
    assert resolve_workload(given_gib, micro.shape, GPU) == Workload("max", 1, 1, "bf16", "compiled", memory_gib=0.5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (WorkloadConfig(context=33), r"workload\.context is 33 but the space's context is 32"),
        (WorkloadConfig(prompt=33), r"workload\.prompt is 33"),
        (WorkloadConfig(runtime="compiled"), r"workload\.runtime=compiled needs a GPU"),
        (WorkloadConfig(batch=4, memory_gib=1.0), "memory_gib is for workload.batch=max, but the batch is 4"),
        (WorkloadConfig(context=8, prompt=9), r"workload\.prompt is 9 but the cache's context is 8"),
        (WorkloadConfig(batch="max", memory_gib=8.1), r"workload\.memory_gib is 8\.1 but CPU has 8\.00 GiB"),
        (WorkloadConfig(batch="max", memory_gib=math.inf), r"workload\.memory_gib is inf"),
    ],
)
def test_a_workload_that_cannot_be_is_one_sentence(micro: SearchSpace, config: WorkloadConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_workload(config, micro.shape, CPU)


def test_a_workload_says_what_its_memory_is() -> None:
    assert str(WORKLOAD) == "batch 4, context 16, prompt 8, fp32, eager"
    most = dataclasses.replace(WORKLOAD, batch="max", memory_gib=1.5)
    assert str(most) == "batch max in 1.5 GiB, context 16, prompt 8, fp32, eager"


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
    check = table.check()
    at_the_workload = check[check["length"].isin([table.meta["workload"][key] for key in ("context", "prompt")])]
    assert not at_the_workload.empty
    for row in at_the_workload.to_dict("records"):
        predicted = table.forward_ms(row["phase"], parse_vector(row["vector"]), row["batch"], row["length"])
        assert predicted == pytest.approx(row["predicted_ms"], rel=1e-6)
    summaries = summarise_check(check)
    assert {summary["phase"] for summary in summaries} == {"decode", "prefill"}
    assert len(summaries) == len(table.meta["check"])
    for summary, told in zip(summaries, table.meta["check"], strict=True):
        assert summary == {key: pytest.approx(told[key]) for key in summary}
