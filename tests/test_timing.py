"""Timing: a fake machine whose faults are planted, the pool against whole models, and real measurements on the CPU."""

import dataclasses
import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.config import MeasureConfig
from nas.errors import UserError
from nas.files import read_json
from nas.latency import Workload, this_device, timing
from nas.latency.accuracy import CHECK_COLUMNS, predict_end_to_end, random_vectors, summarise_check
from nas.latency.energy import ENERGY_COLUMNS
from nas.latency.measurement import Grid, Measured, measure
from nas.latency.pool import LayerPool
from nas.latency.predictor import Point
from nas.latency.table import COLUMNS, TableLatency
from nas.latency.timing import SAMPLE_COLUMNS, Samples, Segment, spread, time_points
from nas.model.decoder import Decoder
from nas.run import FinishedRun
from nas.serving import ServingModel
from nas.serving.cache import layer_caches
from nas.space import SearchSpace, Vector
from nas.stages.measure import _write
from tests.conftest import Nas

CPU = torch.device("cpu")
POINTS = [Point("decode", "layer", (groups,), batch, 16) for groups in (1, 2, 4) for batch in (1, 2, 4)]
POINTS += [Point("prefill", "head", (), 1, 8)]
SENTINEL = POINTS[0]
STEADY = {point: 20.0 + index for index, point in enumerate(POINTS)}  # milliseconds of each on a healthy machine
CONFIG = MeasureConfig(rounds=4, segment=4)
SPACE = "measure.batches=[1]", "measure.contexts=[8]", "workload.batch=2", "workload.context=16", "workload.prompt=4"
GRID, WORKLOAD = Grid((1, 2), (8, 16), (2, 4)), Workload(2, 16, 4, "fp32", "eager")
META: dict[str, Any] = {"device": {"name": "", "slug": ""}, "shape": {}, "workload": {}, "check": []}
META |= dict.fromkeys(("dtype", "runtime", "date"), "")


class Machine:
    """A machine whose clock only its own calls advance.

    Args:
        factor: By how much a call is slower than it should be, given the point and the time.
        lost: Points that do not fit into its memory.
        dies_after: After so many calls it raises KeyboardInterrupt.
        divisor: By which the time of a call is to be divided.
    """

    def __init__(
        self,
        factor: Callable[[Point, float], float] = lambda *_: 1.0,
        lost: tuple[Point, ...] = (),
        dies_after: float = math.inf,
        divisor: int = 1,
    ) -> None:
        self.now, self.prepared, self.calls, self.slow = 0.0, Counter[Point](), Counter[Point](), Counter[Point]()
        self._factor, self._lost, self._dies_after, self._divisor = factor, lost, dies_after, divisor

    def prepare(self, point: Point) -> tuple[Callable[[], None], int]:
        self.prepared[point] += 1
        if point in self._lost:
            raise torch.OutOfMemoryError("planted")

        def call() -> None:
            if self.calls.total() >= self._dies_after:
                raise KeyboardInterrupt
            self.calls[point] += 1
            factor = self._factor(point, self.now)
            self.slow[point] += factor > 1
            self.now += factor * STEADY[point] / 1e3

        return call, self._divisor

    @contextmanager
    def clocks(self) -> Iterator[None]:
        """Makes its clock that of the processor and of CUDA's events."""
        machine = self

        class Event:
            def __init__(self, **_: bool) -> None: ...

            def record(self) -> None:
                self.at = machine.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: "Event") -> float:
                return 1e3 * (end.at - self.at)

        def now() -> float:
            return self.now

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nas.latency.timing.time", SimpleNamespace(perf_counter=now, thread_time=now))
            patch.setattr(torch.cuda, "Event", Event)
            yield

    def time(
        self, samples: Samples, config: MeasureConfig = CONFIG, points: Sequence[Point] = POINTS, on_gpu: bool = True
    ) -> Samples:
        with self.clocks():
            time_points(points, SENTINEL, self.prepare, config, on_gpu, samples)
        return samples


def slow_between(begin: float, end: float) -> Callable[[Point, float], float]:
    return lambda _, now: 1.1 if begin <= now < end else 1.0


def medians(samples: Samples, config: MeasureConfig = CONFIG) -> dict[Point, float]:
    return {point: median(times) for point, times in samples.used(config, on_gpu=True).items()}


def test_on_a_healthy_machine_every_point_is_timed_once_a_round() -> None:
    samples = Machine().time(Samples())
    assert {point: len(times) for point, times in samples.by_point().items()} == dict.fromkeys(POINTS, CONFIG.rounds)
    assert medians(samples) == {point: pytest.approx(ms) for point, ms in STEADY.items()}
    assert samples.drift_report(CONFIG) == {
        "tolerance": 0.02,
        "worst": 0.0,
        "segments": 4 * CONFIG.rounds,
        "segments_beyond": 0,
        "points_affected": 0,
        "points_left_unsteady": 0,
    }
    orders = [[p for segment in samples.segments[i : i + 4] for p in segment.samples] for i in range(0, 16, 4)]
    assert all(set(order) == set(POINTS) for order in orders)
    assert len(set(map(tuple, orders))) > 1  # shuffled


def test_a_segment_on_a_gpu_is_of_one_load_and_does_not_last() -> None:
    samples = Machine().time(Samples(), dataclasses.replace(CONFIG, segment=2))
    loads = [{(point.phase, point.batch) for point in segment.samples} for segment in samples.segments]
    assert all(len(load) == 1 for load in loads)
    sizes = Counter(len(segment.samples) for segment in samples.segments)
    assert sizes == {2: 3 * CONFIG.rounds, 1: 4 * CONFIG.rounds}  # three loads of three points, and one of one
    order = [next(iter(load)) for load in loads]
    assert len({tuple(order[i : i + 7]) for i in range(0, 28, 7)}) > 1


def test_what_a_part_or_a_length_leaves_behind_reaches_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Point("decode", "layer", (groups,), 1, length) for groups in (1, 2, 4) for length in (16, 256)]
    wholes = [Point("decode", "whole", (groups,) * 3, 1, 16) for groups in (1, 2, 4)]
    heads = [Point("decode", "head", (), batch, 1) for batch in (1, 2)]
    for point in [*layers, *wholes, *heads]:
        monkeypatch.setitem(STEADY, point, 20.0)
    before: tuple[str, int] | None = None
    left = 0

    def factor(point: Point, _: float) -> float:  # the first two calls after others are slower
        nonlocal before, left
        if (point.part, point.length) != before:
            before, left = (point.part, point.length), 3
        left -= 1
        return 1.05 if left > 0 else 1.0

    samples = Machine(factor).time(Samples(), CONFIG, [*layers, *wholes, *heads])
    assert medians(samples) == {point: pytest.approx(STEADY[point]) for point in [*layers, *wholes, *heads]}
    assert all(len({(point.part, point.length) for point in segment.samples}) == 1 for segment in samples.segments)
    assert any(len(segment.samples) == 2 and heads[0] in segment.samples for segment in samples.segments)


def test_a_load_is_warmed_up_before_it_is_timed() -> None:
    begun, loaded = 0.0, 0

    def factor(point: Point, now: float) -> float:
        nonlocal begun, loaded
        if point.batch != loaded:
            begun, loaded = now, point.batch
        return 1.1 if now - begun < 0.05 else 1.0  # so long does each load take to settle

    machine = Machine(factor)
    samples = machine.time(Samples(), dataclasses.replace(CONFIG, drift=0.5, spread=0.5))  # nothing is timed again
    assert machine.slow.total() > 0
    assert medians(samples) == {point: pytest.approx(ms) for point, ms in STEADY.items()}


def test_what_a_heavy_load_leaves_behind_is_over_before_the_next_one_is_timed() -> None:
    throttled_until = 0.0

    def factor(point: Point, now: float) -> float:
        nonlocal throttled_until
        if point.batch == 4:
            throttled_until = now + 0.06
        return 1.0 if point.batch == 4 or now >= throttled_until else 1.1

    machine = Machine(factor)
    samples = machine.time(Samples(), dataclasses.replace(CONFIG, drift=0.5, spread=0.5))  # nothing is timed again
    assert machine.slow.total() > 0
    assert medians(samples) == {point: pytest.approx(ms) for point, ms in STEADY.items()}
    assert max(samples.drifts()) < 1e-9


@pytest.mark.parametrize(("longest_s", "even"), [(0.4, True), (math.inf, False)])
def test_a_heavy_load_ends_before_the_power_limit_is_felt(
    longest_s: float, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an H200 does: slower after 0.6 s of it, and a light load lets it recover."""
    heavy = [Point("decode", "whole", (groups,) * 3, 4, 16) for groups in range(1, 31)]
    for point in heavy:
        monkeypatch.setitem(STEADY, point, 40.0)
    busy = 0.0

    def factor(point: Point, _: float) -> float:
        nonlocal busy
        seconds = STEADY[point] / 1e3
        busy = min(1.0, busy + seconds) if point.batch == 4 else max(0.0, busy - 4 * seconds)
        return 1.13 if busy > 0.6 else 1.0

    monkeypatch.setattr(timing, "_LONGEST_S", longest_s)
    config = dataclasses.replace(CONFIG, spread=0.5, segment=40)
    samples = Machine(factor).time(Samples(), config, [SENTINEL, *heavy])
    assert (max(max(times) for times in samples.by_point().values()) < 40.1) == even
    assert {len(times) for times in samples.by_point().values()} == {CONFIG.rounds}


@pytest.mark.parametrize(("on_gpu", "sample_ms"), [(True, 30), (False, 10)])
def test_a_sample_is_of_as_many_calls_as_take_a_while_and_divided_as_the_point_says(
    on_gpu: bool, sample_ms: int
) -> None:
    machine = Machine(lambda *_: 0.05, divisor=3)  # calls of 1 ms
    times = machine.time(Samples(), points=[SENTINEL], on_gpu=on_gpu).by_point()[SENTINEL]
    assert times == pytest.approx([20 * 0.05 / 3] * (CONFIG.rounds if on_gpu else 3))
    if on_gpu:  # three single calls to begin with, and each after one that does not count
        assert (machine.calls[SENTINEL] - 6) % (sample_ms + 1) == 0
    else:  # a look, and in each of three rounds a look (the first twice, as it makes ready), a sample and a look
        assert machine.calls[SENTINEL] % sample_ms == 0


def test_on_a_cpu_what_other_programs_take_is_left_out_and_nothing_is_timed_again_for_it() -> None:
    """Every third call takes up to twice as long, and so do half of them for half of the time."""
    rng = random.Random(0)

    def factor(_: Point, now: float) -> float:
        return rng.uniform(1, 2) if rng.random() < (1 / 2 if now % 2 > 1 else 1 / 3) else 1.0

    machine = Machine(factor)
    config = dataclasses.replace(CONFIG, rounds=8)
    samples = machine.time(Samples(), config, on_gpu=False)
    used = samples.used(config, on_gpu=False)
    assert used.keys() == set(POINTS)
    for point, times in used.items():
        assert times == pytest.approx([STEADY[point]] * 2, rel=0.02)
    assert max(samples.drifts()) > 0.1
    assert all(3 <= len(times) <= config.rounds for times in samples.by_point().values())
    calls = {point: machine.calls[point] for point in POINTS[1:]}
    assert calls == {point: len(samples.by_point()[point]) for point in POINTS[1:]}  # of 20 ms: one call each


def test_on_a_cpu_a_point_is_done_when_its_two_quickest_samples_agree_or_its_rounds_are_over() -> None:
    config = MeasureConfig(rounds=4, spread=0.02)
    given = [[], [1.0, 1.0], [1.0, 1.03, 1.06], [9.0, 1.03, 1.02], [5.0, 1.0, 9.0, 1.5], [math.inf]]
    points = POINTS[: len(given)]
    samples = Samples(
        segments=[Segment(1, 9, {point: ms}) for point, times in zip(points, given, strict=True) for ms in times]
    )
    assert samples.due(points, config, on_gpu=False) == points[:3]
    assert [samples.used(config, on_gpu=False)[point] for point in points[3:5]] == [[1.02, 1.03], [1.0, 1.5]]


def test_on_a_cpu_everything_runs_on_one_thread_and_the_others_come_back() -> None:
    before, seen = torch.get_num_threads(), set[int]()

    def factor(*_: object) -> float:
        seen.add(torch.get_num_threads())
        return 1.0

    torch.set_num_threads(2)
    try:
        Machine(factor).time(Samples(), points=[SENTINEL], on_gpu=False)
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


@given(st.floats(2.0, 10.0), st.floats(1.5, 2.5))
@settings(max_examples=15, deadline=None)
def test_a_drift_is_found_and_what_it_touched_is_timed_again(begin: float, length: float) -> None:
    machine = Machine(slow_between(begin, begin + length))
    samples = machine.time(Samples())
    off = [any(ms > 1.02 * STEADY[SENTINEL] for ms in (segment.before, segment.after)) for segment in samples.segments]
    for segment, seen in zip(samples.segments, off, strict=True):
        wrong = [point for point, ms in segment.samples.items() if ms > 1.05 * STEADY[point]]
        assert seen or not wrong
    affected = {point for segment, seen in zip(samples.segments, off, strict=True) if seen for point in segment.samples}
    assert affected
    report = samples.drift_report(CONFIG)
    assert report["worst"] == pytest.approx(0.1)
    assert (report["segments"], report["segments_beyond"]) == (len(off), sum(off))
    assert (report["points_affected"], report["points_left_unsteady"]) == (len(affected), 0)
    taken, good = samples.by_point(), samples.by_point(CONFIG.drift)
    for point in POINTS:
        assert CONFIG.rounds <= len(taken[point]) <= 2 * CONFIG.rounds
        assert (len(taken[point]) > CONFIG.rounds) == (point in affected)
        assert len(good[point]) >= CONFIG.rounds or len(taken[point]) == 2 * CONFIG.rounds
    assert medians(samples) == {point: pytest.approx(ms) for point, ms in STEADY.items()}


def test_without_the_sentinel_the_same_drift_would_have_spoilt_the_medians() -> None:
    """The test above can fail: a tolerance that lets the drift pass keeps the slow samples."""
    blind = dataclasses.replace(CONFIG, drift=0.5, spread=0.5)
    samples = Machine(slow_between(3.0, 12.0)).time(Samples(), blind)
    assert samples.drift_report(blind)["segments_beyond"] == 0
    assert any(ms > 1.04 * STEADY[point] for point, ms in medians(samples, blind).items())


def test_a_point_that_never_met_the_machine_steady_is_told_and_keeps_what_there_is() -> None:
    point, other = POINTS[1:3]
    segments = [Segment(10.0, 10.0, {other: 1.0}) for _ in range(4)] + [Segment(11.0, 10.0, {point: 5.0})] * 2
    samples = Samples(segments=segments)
    report = samples.drift_report(CONFIG)
    assert (report["segments_beyond"], report["points_affected"], report["points_left_unsteady"]) == (2, 1, 1)
    assert samples.used(CONFIG, on_gpu=True) == {other: [1.0] * 4, point: [5.0, 5.0]}
    assert samples.due([point, other], CONFIG, on_gpu=True) == [point]
    assert samples.drifts() == pytest.approx([0] * 4 + [0.1] * 2)


def test_what_does_not_fit_into_memory_is_said_so_and_not_tried_again(tmp_path: Path) -> None:
    lost = (POINTS[4], POINTS[9])
    machine = Machine(lost=lost)
    samples = machine.time(Samples.at(tmp_path / "samples.csv"))
    assert {point: samples.by_point(CONFIG.drift)[point] for point in lost} == {point: [math.inf] for point in lost}
    assert [machine.prepared[point] for point in lost] == [1, 1]
    fitted = {point: ms for point, ms in STEADY.items() if point not in lost}
    assert {point: ms for point, ms in medians(samples).items() if point in fitted} == {
        point: pytest.approx(ms) for point, ms in fitted.items()
    }
    assert all(len(samples.by_point()[point]) == CONFIG.rounds for point in fitted)
    assert samples.drift_report(CONFIG)["points_left_unsteady"] == 0
    again = Machine(lost=lost)
    more = again.time(Samples.at(tmp_path / "samples.csv"), dataclasses.replace(CONFIG, rounds=6))
    assert not any(again.prepared[point] for point in lost)
    assert all(len(more.by_point()[point]) == 6 for point in fitted)


def test_a_sentinel_that_does_not_fit_any_more_ends_the_measurement_and_keeps_the_samples(tmp_path: Path) -> None:
    def shrinking(point: Point, now: float) -> float:
        if point == SENTINEL and now > 3.0:
            raise torch.OutOfMemoryError("another process took it")
        return 1.0

    samples = Samples.at(tmp_path / "samples.csv")
    with pytest.raises(UserError, match=f"not even {SENTINEL.batch} rows"):
        Machine(shrinking).time(samples)
    kept = Samples.at(tmp_path / "samples.csv")
    assert kept.segments == samples.segments != []
    assert all(math.isfinite(drift) for drift in kept.drifts())


def test_memory_that_ends_within_the_first_call_counts_too() -> None:
    def factor(point: Point, _: float) -> float:
        if point == POINTS[4]:
            raise torch.OutOfMemoryError("activations")
        return 1.0

    samples = Machine(factor).time(Samples())
    assert samples.by_point()[POINTS[4]] == [math.inf]
    assert sum(map(len, samples.by_point().values())) == CONFIG.rounds * (len(POINTS) - 1) + 1


def test_a_sentinel_that_does_not_fit_into_memory_is_said() -> None:
    with pytest.raises(UserError, match=r"fit into memory; lower workload\.context"):
        Machine(lost=(SENTINEL,), dies_after=100 * len(POINTS)).time(Samples())


def test_a_point_that_scatters_gets_more_samples_than_a_steady_one_but_no_more_than_twice_as_many() -> None:
    rng = random.Random(0)
    noisy = POINTS[3]
    samples = Machine(lambda point, _: rng.uniform(0.7, 1.3) if point == noisy else 1.0).time(Samples())
    counts = {point: len(times) for point, times in samples.by_point().items()}
    assert counts.pop(noisy) == 2 * CONFIG.rounds
    assert set(counts.values()) == {CONFIG.rounds}


def test_one_outlier_is_soon_outvoted() -> None:
    times = [1.0, 2.0, 1.0, 1.0]
    outvoted = [*times, 1.0, 1.0, 1.0]
    for taken, due in ((times, [SENTINEL]), (outvoted, [])):
        samples = Samples(segments=[Segment(1, 1, {SENTINEL: ms}) for ms in taken])
        assert samples.due([SENTINEL], CONFIG, on_gpu=True) == due


def test_the_spread_is_how_far_the_outer_fifths_are_apart() -> None:
    assert spread([10, 20, 30, 40, 50, 1e9]) == pytest.approx((50 - 20) / 35)  # one outlier does not widen it
    assert spread([7.0]) == 0


@given(st.integers(60, 500))
@settings(max_examples=4, deadline=None)
def test_a_measurement_that_was_killed_goes_on_and_times_nothing_again(kill: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.csv"
        first, before = Machine(dies_after=kill), Samples.at(path)
        with pytest.raises(KeyboardInterrupt):
            first.time(before)
        kept = Samples.at(path)
        assert kept.segments == before.segments  # to the last bit, from the file
        second = Machine()
        finished = second.time(kept)
        assert Samples.at(path).segments == finished.segments
        assert finished.segments[: len(before.segments)] == before.segments
        assert {p: len(times) for p, times in finished.by_point().items()} == dict.fromkeys(POINTS, CONFIG.rounds)
        new = {point: CONFIG.rounds - len(before.by_point().get(point, [])) for point in POINTS}
        for point in POINTS[1:]:  # the sentinel is timed all the time
            assert (second.prepared[point], second.calls[point] > 0) == (new[point] > 0, new[point] > 0)
        assert medians(finished) == {point: pytest.approx(ms) for point, ms in STEADY.items()}
        assert Machine().time(finished).segments == Samples.at(path).segments  # nothing is left to do


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    whole = Machine().time(Samples.at(path))
    path.write_bytes(path.read_bytes()[:-7])
    cut = Samples.at(path)

    def lines(samples: Samples) -> list[tuple[int, Point, float]]:
        return [(at, *line) for at, segment in enumerate(samples.segments) for line in segment.samples.items()]

    assert lines(cut) == lines(whole)[:-1]
    assert {p: len(t) for p, t in Machine().time(cut).by_point().items()} == dict.fromkeys(POINTS, CONFIG.rounds)


@pytest.mark.parametrize("left", ["", "segment,sentinel_be", ",".join(SAMPLE_COLUMNS) + "\n"])
def test_a_measurement_that_was_killed_before_its_first_segment_starts_afresh(tmp_path: Path, left: str) -> None:
    path = tmp_path / "samples.csv"
    path.write_text(left)
    samples = Samples.at(path)
    assert samples.segments == []
    Machine().time(samples)
    assert Samples.at(path).segments == samples.segments
    assert path.read_text().count("sentinel_before_ms") == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("sentinel_after_ms", "after"),
        lambda text: text.replace(",ms\n", ",seconds\n", 1),
        lambda text: text.replace("layer,1,", "layer,one,", 1),
        lambda text: text.replace("layer,1,", "layer,1-x,", 1),
        lambda text: text.replace(",16,", ",long,", 1),
        lambda text: text.replace(".", "point", 1),
        lambda text: text.replace(",layer,", ",lawyer,", 1),
        lambda text: text.replace("\n0,", "\n0,-", 1),
        lambda text: re.sub(r",[0-9.]+\n", ",\n", text, count=1),
        lambda text: re.sub(r",[0-9.]+\n", ",0\n", text, count=1),
        lambda text: '"' + text,
        lambda text: "\0\n" + text,
    ],
)
def test_corrupt_samples_are_one_sentence(tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = tmp_path / "samples.csv"
    Machine(lambda *_: 1.01).time(Samples.at(path))
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with pytest.raises(UserError, match=r"samples\.csv") as refusal:
        Samples.at(path)
    assert "\n" not in str(refusal.value)


def pool_of(space: SearchSpace, points: list[Point], memory_bytes: int = 2**30) -> LayerPool:
    return LayerPool(space, "fp32", "eager", CPU, points, memory_bytes)


def run_point(pool: LayerPool, point: Point) -> Any:
    with torch.inference_mode():
        return pool.prepare(point)[0]()


@torch.no_grad()
def random_decoder(space: SearchSpace, vector: Vector, pool: LayerPool) -> Decoder:
    """A model whose weights the pool's layers of a vector have, too; so large that every part shows in the logits."""
    decoder, generator = Decoder(space.shape, vector), torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    for position, groups, layer in zip(pool._layers, vector, decoder.model.layers, strict=True):
        position[groups].load(layer)
    parts = (decoder.model.embed_tokens, decoder.model.norm, decoder.lm_head)
    for own, part in zip(pool._embeddings_and_heads[0], parts, strict=True):
        own.get_parameter("weight").copy_(part.get_parameter("weight"))
    return decoder.requires_grad_(False)


@pytest.mark.parametrize("vector", [(4, 1, 2), (1, 1, 1), (2, 4, 4)])
def test_a_whole_model_of_the_pool_is_one_put_together_from_its_weights(micro: SearchSpace, vector: Vector) -> None:
    prefill, decode = (Point(phase, "whole", vector, 4, 8) for phase in ("prefill", "decode"))
    bigger = Point("decode", "layer", (4,), 5, 16)
    pool = pool_of(micro, [prefill, decode, bigger])
    decoder = random_decoder(micro, vector, pool)
    tokens = pool._tokens[:32].view(4, 8)
    prompts = run_point(pool, prefill)
    torch.testing.assert_close(prompts, decoder(tokens)[:, -1], atol=1e-3, rtol=1e-4)

    # The prompts are in the cache now, and the same cache serves a step of as many rows and tokens.
    step = run_point(pool, decode)
    in_full = torch.cat([tokens[:, :7], pool._tokens[:4, None]], dim=1)
    expected = decoder(in_full)[:, -1]
    torch.testing.assert_close(step, expected, atol=1e-3, rtol=1e-4)
    assert (step - prompts).abs().max() > 0.1

    caches = layer_caches(pool._keys, pool._values, micro.shape, vector, 4, 8)
    served = ServingModel.of(decoder)
    torch.testing.assert_close(served(pool._tokens[:4, None], caches, 7), step, atol=1e-3, rtol=1e-4)
    other = Point("prefill", "whole", (vector[0], vector[1], 1 if vector[2] > 1 else 4), 4, 8)
    assert (run_point(pool, other) - prompts).abs().max() > 0.01


def test_a_layer_is_timed_over_all_positions_and_divided_by_the_depth(micro: SearchSpace) -> None:
    points = [Point("decode", "layer", (2,), 4, 16), Point("prefill", "layer", (2,), 2, 8)]
    ends = [Point("prefill", "embedding", (), 2, 8), Point("prefill", "head", (), 2, 8)]
    whole = Point("decode", "whole", (4, 1, 2), 4, 16)
    pool = pool_of(micro, [*points, *ends, whole])
    ran: list[tuple[int, int]] = []
    for index, position in enumerate(pool._layers):
        for groups, layer in position.items():
            layer.register_forward_hook(lambda *_, at=(index, groups): ran.append(at))

    def run(point: Point) -> tuple[Any, int]:
        with torch.inference_mode():
            call, divisor = pool.prepare(point)
            ran.clear()
            return call(), divisor

    for point in points:
        assert run(point)[1] == micro.shape.num_hidden_layers == 3
        assert ran == [(0, 2), (1, 2), (2, 2)]
    assert run(whole)[1] == 1
    assert ran == [(0, 4), (1, 1), (2, 2)]
    for point in ends:
        outputs, divisor = run(point)
        assert len(outputs) == divisor == len(pool._embeddings_and_heads) > 1
        expected = (2, 8, 32) if point.part == "embedding" else (2, 320)
        assert {tuple(output.shape) for output in outputs} == {expected}
        assert not torch.equal(outputs[0], outputs[1])  # each has weights of its own
    assert pool.prepare(whole) is pool.prepare(whole)


def test_positions_have_weights_of_their_own_and_their_layers_share_what_the_groups_leave_alone(
    micro: SearchSpace,
) -> None:
    pool = pool_of(micro, [Point("decode", "layer", (4,), 1, 8)])
    for position in pool._layers:
        assert set(position) == {1, 2, 4}
        for name in ("o_proj", "gate_up_proj", "down_proj"):
            assert len({getattr(layer, name).weight.data_ptr() for layer in position.values()}) == 1
        assert len({layer.qkv_proj.weight.data_ptr() for layer in position.values()}) == 3
    assert len({position[1].down_proj.weight.data_ptr() for position in pool._layers}) == 3


def test_a_cache_larger_than_the_memory_is_out_of_memory_and_a_smaller_one_is_not(
    micro: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = Point("decode", "layer", (4,), 64, 32), Point("decode", "layer", (4,), 8, 32)
    mixed = Point("decode", "whole", (1, 4, 1), 64, 32)
    few = Point("decode", "whole", (1, 1, 2), 16, 32)  # as large as the small layer's where it is largest
    points = [large, small, mixed, few]
    layers = 3 * (32 * 32 + 3 * 32 * 256 + 2 * 32 + sum(32 * (32 + 2 * 8 * groups) for groups in (1, 2, 4)))
    ends = len(pool_of(micro, points, 0)._embeddings_and_heads) * (2 * 320 * 32 + 32)
    held = 4 * (layers + ends)
    cache = 2 * 3 * 8 * 4 * 32 * 8 * 4  # keys and values, layers, batch, groups, length, head width, bytes
    enough = pool_of(micro, points, held + cache)
    for point in (small, few):
        run_point(enough, point)
    for point in (large, mixed):
        with pytest.raises(torch.OutOfMemoryError):
            run_point(enough, point)
    short = pool_of(micro, points, held + cache - 1)
    with pytest.raises(torch.OutOfMemoryError):
        run_point(short, small)
    monkeypatch.setattr("nas.latency.pool._FEWEST_LAYERS", 2)
    monkeypatch.setattr("nas.latency.pool._BEYOND_CACHES", cache // 2)
    assert short.prepare(small)[1] == 2  # of three layers, two: enough to be beyond a processor's cache
    with pytest.raises(torch.OutOfMemoryError):
        run_point(short, large)


def test_a_measurement_on_this_machine_covers_the_grid_and_whole_models(micro: SearchSpace, tmp_path: Path) -> None:
    config = MeasureConfig(rounds=2)
    shapes: list[tuple[Any, int, int]] = [("decode", 2, 16), ("prefill", 2, 4), ("decode", 1, 12)]
    found = measure(micro, GRID, shapes, WORKLOAD, config, 2, this_device(), tmp_path / "samples.csv")
    assert found.energy is None
    assert list(found.table.columns) == COLUMNS
    timed = {(row.phase, row.part, row.groups, row.batch, row.length) for row in found.table.itertuples()}
    expected = {(p.phase, p.part, sum(p.groups), p.batch, p.length) for p in GRID.points(micro)}
    assert timed == expected
    assert len(found.table) == len(expected)
    assert (found.table["median_ms"] > 0).all()
    assert (found.table["n"] == 2).all()
    assert (found.table["status"] == "ok").all()
    vectors = random_vectors(micro, 2, config.seed)
    assert set(found.end_to_end_ms) == {
        Point(p, "whole", v, batch, length) for p, batch, length in shapes for v in vectors
    }
    assert found.metadata == {"clock": "CPU time of one thread"}
    kept = Samples.at(tmp_path / "samples.csv")
    assert set(kept.by_point()) == {*GRID.points(micro), *found.end_to_end_ms}


def test_a_table_tells_how_much_longer_the_steps_of_the_energy_measurement_took(
    micro: SearchSpace, tmp_path: Path
) -> None:
    rows = [("decode", "layer", 2, batch, length, 1.0, 1.0, 1.0, 3, "ok") for batch in (1, 2) for length in (8, 16)]
    rows += [
        ("decode", part, 0, batch, 1, 0.5, 0.5, 0.5, 3, "ok") for part in ("embedding", "head") for batch in (1, 2)
    ]
    energy = pd.DataFrame([(2, 2, 16, 100.0, 0.5, 5.0, 1000, "energy counter")], columns=ENERGY_COLUMNS)
    found = Measured(pd.DataFrame(rows, columns=COLUMNS), {}, energy, {"drift": {}})
    _write(tmp_path, found, META | {}, micro)
    ratio = round(5000 / 1000 / (3 * 1.0 + 2 * 0.5), 4)
    assert TableLatency(tmp_path).meta["lasting_load"] == [{"groups": 2, "batch": 2, "length": 16, "ratio": ratio}]


def test_a_measurement_says_what_did_not_fit(
    micro: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(_: LayerPool, point: Point) -> tuple[Callable[[], Any], int]:
        if point.batch == 2 and point.length == 16:
            raise torch.OutOfMemoryError("planted")
        return (lambda: sum(range(20_000))), 1

    monkeypatch.setattr(LayerPool, "prepare", prepare)
    shapes: list[tuple[Any, int, int]] = [("decode", 2, 16), ("decode", 1, 12)]
    found = measure(micro, GRID, shapes, WORKLOAD, MeasureConfig(rounds=1), 2, this_device(), tmp_path / "samples.csv")
    lost = found.table[found.table["status"] == "out_of_memory"]
    assert [tuple(row) for row in lost[["phase", "part", "groups", "batch", "length"]].to_numpy()] == [
        ("decode", "layer", groups, 2, 16) for groups in (1, 2, 4)
    ]
    assert lost["median_ms"].isna().all()
    assert {point.length for point in found.end_to_end_ms} == {12}
    found.table.to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "latency.json").write_text(json.dumps(META))
    table = TableLatency(tmp_path)
    assert table.layer_ms("decode", 1, 2, 8) > 0
    with pytest.raises(UserError, match="less where memory ended"):
        table.layer_ms("decode", 1, 2, 16)
    check = predict_end_to_end(found.end_to_end_ms, table)
    assert list(check.columns) == CHECK_COLUMNS
    for row, (point, ms) in zip(check.itertuples(), sorted(found.end_to_end_ms.items()), strict=True):
        layers = sum(table.layer_ms("decode", groups, 1, 12) for groups in point.groups)
        assert row.measured_ms == ms
        assert row.predicted_ms == pytest.approx(layers + table.embedding_and_head_ms("decode", 1, 1))


def test_measuring_writes_all_that_belongs_together_and_publishes_it(
    nas: Nas, micro_file: Path, tmp_path: Path
) -> None:
    arguments = ("measure", f"space={micro_file}", *SPACE, "measure.rounds=1", "check=2", "name=mine")
    device = this_device()
    target = tmp_path / "shared" / device.slug / "micro-fp32-eager"
    target.mkdir(parents=True)
    (target / "energy.csv").write_text("of an older table")
    result = nas(*arguments, "publish=shared")
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "measure" / "mine"
    written = {"table.csv", "check.csv", "check.png", "check.svg", "latency.json", "samples.csv"}
    assert written <= {path.name for path in run.iterdir()}
    finished = FinishedRun(run, "measure")
    assert all(finished.artifact(name) for name in written)

    meta = read_json(run / "latency.json")
    check = pd.read_csv(run / "check.csv")
    assert meta["check"] == [
        {key: pytest.approx(value) for key, value in summary.items()} for summary in summarise_check(check)
    ]
    at = {(summary["phase"], summary["batch"], summary["length"]) for summary in meta["check"]}
    assert {("decode", 2, 16), ("prefill", 2, 4)} < at
    assert meta["workload"] == WORKLOAD.to_dict()
    assert "CPU time of one thread, good for ratios between vectors" in TableLatency(run).description
    for summary in meta["check"]:
        where = f"{summary['phase']} at batch {summary['batch']} and {summary['length']} tokens: mean error"
        assert f"predicted against 2 end-to-end models, {where} {summary['mape']:.2%}" in result.out

    published = {"table.csv", "check.csv", "check.png", "latency.json"}
    assert {path.name for path in target.iterdir()} == published
    assert all((target / name).read_bytes() == (run / name).read_bytes() for name in published)
    assert read_json(tmp_path / "shared" / device.slug / "device.json")["name"] == device.name
    table = TableLatency(target)
    assert table.check().equals(check)

    for path in target.iterdir():
        path.unlink()
    again = nas(*arguments, "publish=shared")  # measured before; publishing is what is left
    assert again.code == 0, again.err
    assert {path.name for path in target.iterdir()} == published


def test_without_whole_models_there_is_no_check_to_draw(nas: Nas, micro_file: Path, tmp_path: Path) -> None:
    result = nas("measure", f"space={micro_file}", *SPACE, "measure.rounds=1", "check=0", "name=mine")
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "measure" / "mine"
    assert read_json(run / "latency.json")["check"] == []
    assert not (run / "check.png").exists()
    assert pd.read_csv(run / "check.csv").empty
    assert "mean error" not in TableLatency(run).description


def test_a_stopped_measurement_goes_on_under_its_name(
    nas: Nas, micro_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["measure", f"space={micro_file}", *SPACE, "measure.rounds=2", "check=2", "name=mine"]
    run = tmp_path / "runs" / "measure" / "mine"
    samples = run / "samples.csv"
    prepare, prepared = LayerPool.prepare, Counter[Point]()

    def stopping(pool: LayerPool, point: Point) -> tuple[Callable[[], Any], int]:
        prepared[point] += 1
        if len(prepared) > 30:  # in the second segment
            raise KeyboardInterrupt
        return prepare(pool, point)

    with monkeypatch.context() as patch:
        patch.setattr(LayerPool, "prepare", stopping)
        assert nas(*arguments).code != 0
    assert not (run / "complete.json").exists()
    left = samples.read_bytes().rpartition(b"\n")[0] + b"\n"
    result = nas(*arguments)
    assert result.code == 0, result.err
    assert samples.read_bytes().startswith(left)
    assert len(samples.read_bytes()) > len(left)
    assert FinishedRun(run, "measure").artifact("table.csv")
    timed = pd.read_csv(samples)
    counts = timed.groupby(["phase", "part", "groups", "batch", "length"]).size()
    assert (counts == 2).all()
    table = pd.read_csv(run / "table.csv")
    assert len(table) == (counts.reset_index()["part"] != "whole").sum()
    assert "already finished" in nas(*arguments).err
