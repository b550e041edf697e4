"""Timing many points fairly: in rounds and shuffled, watched by a sentinel, until each one's spread is small.

A round's points come in segments, and between any two segments a *sentinel*, always the same point, is timed. Where it
is off its own median by more than the tolerance, the machine was not itself, and the segments on both sides are timed
again. Samples are written down a segment at a time, so a killed measurement loses no more than one.

On a GPU a segment's points are of one phase and batch, and segments are shuffled, too (randomised blocks): at its power
limit it remembers for a tenth of a second or two what ran before. On an H100 a step right after a prompt took 2.5 %
longer than after another step, on an H200 one after a step of 300 rows 2 % longer than after one of 30. So each look at
the sentinel, and each segment, begins with a warm-up under its own load. Nor does a segment last: under a heavy load an
H200 ran evenly for 0.6 s, then fell to 13 % below that for 0.4 s, and so on, every 1.2 s. What is timed is the even
speed; how far a lasting load is below it is measured with the energy.
"""

import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from nas.config import MeasureConfig
from nas.console import progress_bar
from nas.errors import UserError
from nas.latency.points import PARTS, Point, point_of
from nas.tables import positive_numbers, read_csv, require, whole_numbers

Prepare = Callable[[Point], tuple[Callable[[], Any], int]]

SAMPLES = "samples.csv"
SAMPLE_COLUMNS = [
    "segment",
    "sentinel_before_ms",
    "sentinel_after_ms",
    "phase",
    "part",
    "groups",
    "batch",
    "length",
    "ms",
]
_SHORTEST_S = {"cuda": 3e-2, "cpu": 1e-2}  # a sample repeats a faster call until it lasts this long
_LOAD = {"cuda": attrgetter("phase", "batch"), "cpu": attrgetter("phase")}  # what points of one segment share
_REST_S = {"cuda": 0.25, "cpu": 0.01}  # of the sentinel, a light load, before a look at it
_WARM_UP_S = {"cuda": 0.1, "cpu": 0.05}  # of a segment
_LONGEST_S = {"cuda": 0.4, "cpu": math.inf}  # of a segment, which has one sample at least
_SENTINEL_SAMPLES = 3


@dataclass(frozen=True)
class Segment:
    """Samples taken one after another, and what the sentinel took before and after them.

    Attributes:
        before: Milliseconds of the sentinel.
        after: The same.
        samples: Milliseconds by point; infinite for one that does not fit into memory.
    """

    before: float
    after: float
    samples: dict[Point, float]


@dataclass
class Samples:
    """All samples of a measurement; with a path, written there as they come."""

    path: Path | None = None
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path) -> "Samples":
        """Those that an interrupted measurement left at ``path``, or none.

        Raises:
            UserError: The file is corrupt.
        """
        if not path.is_file():
            return cls(path)
        content = path.read_bytes()
        if end := content.rfind(b"\n") + 1:
            os.truncate(path, end)  # without a line that a kill or a full disk cut short
        else:
            path.unlink()
            return cls(path)
        frame = read_csv(path, SAMPLE_COLUMNS)
        good = positive_numbers(frame, SAMPLE_COLUMNS[1:3]) & whole_numbers(frame, ["segment", "batch", "length"])
        good &= frame["part"].isin(PARTS) & (pd.to_numeric(frame["ms"], errors="coerce") > 0)
        require(path, frame, good, "a part is unknown, or a number not positive")
        segments = []
        try:
            for _, rows in frame.groupby("segment"):
                points = [point_of(*row) for row in rows[SAMPLE_COLUMNS[3:8]].itertuples(index=False)]
                first = rows.iloc[0]
                times = dict(zip(points, rows["ms"].astype(float), strict=True))
                segments.append(Segment(float(first.iloc[1]), float(first.iloc[2]), times))
        except (ValueError, TypeError, UserError) as error:
            raise UserError(f"{path} is corrupt ({error}); remove it and measure again") from None
        return cls(path, segments)

    def add(self, segment: Segment) -> None:
        """Appends a segment, to the file too."""
        rows = [[len(self.segments), segment.before, segment.after, *p.row(), ms] for p, ms in segment.samples.items()]
        self.segments.append(segment)
        if self.path:
            text = pd.DataFrame(rows, columns=SAMPLE_COLUMNS).to_csv(index=False, header=not self.path.is_file())
            try:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(text)
            except OSError as error:  # which does not say where
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def drifts(self) -> list[float]:
        """By which share each segment's sentinel was off its median over all, at the worse of both sides."""
        usual = median([ms for segment in self.segments for ms in (segment.before, segment.after)] or [math.nan])
        return [max(abs(ms / usual - 1) for ms in (segment.before, segment.after)) for segment in self.segments]

    def by_point(self, tolerance: float = math.inf) -> dict[Point, list[float]]:
        """Samples of each point, without those of segments in which the sentinel drifted more than ``tolerance``."""
        samples: dict[Point, list[float]] = {}
        for segment, drift in zip(self.segments, self.drifts(), strict=True):
            for point, ms in segment.samples.items():
                kept = samples.setdefault(point, [])
                if not drift > tolerance or math.isinf(ms):
                    kept.append(ms)
        return samples


def time_points(
    points: Sequence[Point],
    sentinel: Point,
    prepare: Prepare,
    config: MeasureConfig,
    device: torch.device,
    samples: Samples,
) -> None:
    """Times every point until it has enough steady samples, or twice as many as asked for.

    Args:
        points: What to time.
        sentinel: One of them.
        prepare: Gives what runs a point, and by how much its time is divided. Raises `torch.OutOfMemoryError`.
        config: Its rounds, spread, drift and segment count.
        device: Where it runs.
        samples: Those of an earlier attempt; new ones are added.
    """
    stopwatch = _Stopwatch(prepare, device)
    rng = random.Random(config.seed + len(samples.segments))

    def done() -> int:
        return sum(config.rounds if math.inf in times else len(times) for times in samples.by_point().values())

    total = config.rounds * len(points)
    with progress_bar("Timing", total) as bar:
        while due := due_points(points, samples, config):
            total = max(total, done() + len(due))  # what drifted or scattered is timed again
            before = stopwatch.look_at(sentinel)
            for load in _loads(due, _LOAD[device.type], config.segment, rng):
                if any([stopwatch.make_ready(point) for point in load]):  # all of them, which is work for the device
                    before = stopwatch.look_at(sentinel)
                while load:
                    times = stopwatch.burst(load)
                    after = stopwatch.look_at(sentinel)
                    samples.add(Segment(before, after, times))
                    load, before = load[len(times) :], after
                    bar.update(done(), f"drift {max(samples.drifts()):.1%}", total)


def _loads(points: Iterable[Point], kind: Callable[[Point], Any], most: int, rng: random.Random) -> list[list[Point]]:
    """Points of one kind, no more than ``most``, shuffled inside and among each other."""
    loads: dict[Any, list[Point]] = {}
    for point in points:
        loads.setdefault(kind(point), []).append(point)
    for load in loads.values():
        rng.shuffle(load)
    parts = [load[begin : begin + most] for load in loads.values() for begin in range(0, len(load), most)]
    rng.shuffle(parts)
    return parts


def due_points(points: Iterable[Point], samples: Samples, config: MeasureConfig) -> list[Point]:
    """Points that are still to be timed: too few steady samples, or too wide a spread, and not tired of trying."""
    taken, good = samples.by_point(), samples.by_point(config.drift)

    def is_due(point: Point) -> bool:
        if any(map(math.isinf, taken.get(point, []))) or len(taken.get(point, [])) >= 2 * config.rounds:
            return False
        return len(good.get(point, [])) < config.rounds or spread(good[point]) > config.spread

    return [point for point in points if is_due(point)]


def spread(times: Sequence[float]) -> float:
    """How far the 20th and 80th percentiles are apart, as a share of the median."""
    low, middle, high = np.percentile(times, [20, 50, 80])
    return float((high - low) / middle)


def usable(samples: Samples, config: MeasureConfig) -> Iterator[tuple[Point, list[float]]]:
    """Each point's samples: the steady ones, or all where drift has left few."""
    good = samples.by_point(config.drift)
    for point, times in samples.by_point().items():
        yield point, good[point] if len(good[point]) > config.rounds // 2 else times


def drift_report(samples: Samples, config: MeasureConfig) -> dict[str, Any]:
    """What latency.json says of the sentinel."""
    drifts = samples.drifts()
    affected = [segment for segment, drift in zip(samples.segments, drifts, strict=True) if drift > config.drift]
    redone = Counter(point for segment in affected for point in segment.samples)
    good = samples.by_point(config.drift)
    return {
        "tolerance": config.drift,
        "worst": round(max(drifts, default=0.0), 5),
        "segments": len(drifts),
        "segments_beyond": len(affected),
        "points_affected": len(redone),
        "points_left_unsteady": sum(not good[point] for point in redone),
    }


@contextmanager
def memory_watched() -> Iterator[None]:
    """Makes a CPU's lack of memory the error that a GPU's is: `torch.OutOfMemoryError`."""
    try:
        yield
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


class _Stopwatch:
    """Makes each point ready once, and times it."""

    def __init__(self, prepare: Prepare, device: torch.device) -> None:
        self._prepare, self._device = prepare, device
        self._ready: dict[Point, tuple[Callable[[], Any], int, int] | None] = {}  # call, repeats, divisor

    def make_ready(self, point: Point) -> bool:
        """What takes a while and is done once; whether that was now."""
        if point in self._ready:
            return False
        self._ready[point] = self._made_ready(point)
        return True

    def burst(self, points: Sequence[Point]) -> dict[Point, float]:
        """A sample each of the first few, no more than a device can run evenly after a rest."""
        begun, device = time.perf_counter(), self._device.type
        self._run(points, _WARM_UP_S[device])
        times: dict[Point, float] = {}
        for point in points:
            times[point] = self.sample(point)
            if time.perf_counter() - begun > _LONGEST_S[device]:
                break
        return times

    def look_at(self, sentinel: Point) -> float:
        """The median of a few samples of the sentinel.

        Raises:
            UserError: It does not fit into memory, now or any more.
        """
        self.make_ready(sentinel)
        self._run([sentinel], _REST_S[self._device.type])
        milliseconds = median(self.sample(sentinel) for _ in range(_SENTINEL_SAMPLES))
        if math.isfinite(milliseconds):
            return milliseconds
        raise UserError(
            f"not even {sentinel.batch} rows of {sentinel.length} tokens with {max(sentinel.groups)} KV groups a layer "
            "fit into memory; lower workload.context, or give smaller measure.batches"
        )

    def sample(self, point: Point) -> float:
        """Milliseconds of one call, divided; infinite where it does not fit into memory."""
        if (ready := self._ready[point]) is None:
            return math.inf
        call, repeats, divisor = ready
        try:
            with memory_watched(), torch.inference_mode():
                return 1e3 * self._seconds(call, repeats) / repeats / divisor
        except torch.OutOfMemoryError:  # what was made ready since has left it too little
            self._ready[point] = None
            return math.inf

    def _run(self, points: Iterable[Point], seconds: float) -> None:
        """The first that fits into memory, so long."""
        end = time.perf_counter() + seconds
        for point in points:
            while time.perf_counter() < end and math.isfinite(self.sample(point)):
                pass

    def _made_ready(self, point: Point) -> tuple[Callable[[], Any], int, int] | None:
        try:
            with memory_watched(), torch.inference_mode():
                call, divisor = self._prepare(point)
                self._seconds(call, 1)  # warm-up
                shortest = min(self._seconds(call, 1) for _ in range(2))
                repeats = max(1, math.ceil(_SHORTEST_S[self._device.type] / max(shortest, 1e-7)))
        except torch.OutOfMemoryError:
            return None
        return call, repeats, divisor

    def _seconds(self, call: Callable[[], Any], repeats: int) -> float:
        if self._device.type == "cuda":
            call()  # a GPU that was left alone for a moment is not at its steady speed
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - begun
