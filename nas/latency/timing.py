"""Timing many points fairly: in rounds and shuffled, watched by a sentinel, always the same point, between segments.

On a GPU wall time counts. At its power limit it remembers for a tenth of a second or two what ran before: on an H100 a
step right after a prompt took 2.5 % longer, on an H200 a layer after an output head 4 %. So a segment is of one load
and begins with a warm-up under it, as a look at the sentinel does. Nor does it last: an H200 under a heavy load ran
evenly for 0.6 s, then fell to 13 % below that for 0.4 s, and so on. What is timed is the even speed; how far a lasting
load is below it is measured with the energy. Samples beside a sentinel that was off its own median do not count.

On a CPU, which other programs share, everything runs on one thread, whose own CPU time is read. What is left of them
(caches and memory that they use, too) only ever adds, so a sample is the quickest of a few calls. Such times are good
for ratios between vectors. They are no latency: serving uses all cores, and shares them.
"""

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch

from nas import console
from nas.config import MeasureConfig
from nas.errors import UserError, is_out_of_memory
from nas.files import read_csv
from nas.hardware import cpu_threads
from nas.latency.predictor import EMBEDDING_AND_HEAD, PARTS, POINT_COLUMNS, Point
from nas.serving.runtime import milliseconds

SAMPLES = "samples.csv"
SAMPLE_COLUMNS = ["segment", "sentinel_before_ms", "sentinel_after_ms", *POINT_COLUMNS, "ms"]

Prepare = Callable[[Point], tuple[Callable[[], Any], int]]
Result = TypeVar("Result")
_SHORTEST_S, _SHORTEST_CPU_S = 3e-2, 1e-2  # a sample repeats a faster call until it lasts this long
_REST_S = 0.25  # of the sentinel, a light load, before a look at it on a GPU
_WARM_UP_S = 0.1  # of a segment on a GPU
_LONGEST_S = 0.4  # of a segment on a GPU, which has one sample at least


class Segment(NamedTuple):
    """Samples taken one after another, in milliseconds."""

    before: float  # the sentinel
    after: float  # the sentinel
    samples: dict[Point, float]  # infinite for a point that does not fit into memory


@dataclass
class Samples:
    """All samples of a measurement; with a path, written there as they come."""

    path: Path | None = None
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path) -> "Samples":
        """Those that an interrupted measurement left at ``path``, or none."""
        complete = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
        if not complete:
            path.unlink(missing_ok=True)
            return cls(path)
        os.truncate(path, complete)  # without a line that a kill or a full disk cut short
        frame, segments = read_csv(path, SAMPLE_COLUMNS), dict[int, Segment]()
        try:
            if not (frame["part"].isin(PARTS) & (frame[[*SAMPLE_COLUMNS[1:3], "ms"]] > 0).all(axis=1)).all():
                raise ValueError("a part is unknown, or a time not positive")
            for number, before, after, *point, ms in frame[SAMPLE_COLUMNS].itertuples(index=False):
                segments.setdefault(number, Segment(before, after, {})).samples[Point.of_row(*point)] = ms
        except (ValueError, TypeError, UserError) as error:
            raise UserError(f"{path} is corrupt ({error}); remove it and measure again") from None
        return cls(path, list(segments.values()))

    def add(self, segment: Segment) -> None:
        """Appends a segment, to the file too."""
        rows = [[len(self.segments), segment.before, segment.after, *p.row(), ms] for p, ms in segment.samples.items()]
        self.segments.append(segment)
        if self.path:
            frame = pd.DataFrame(rows, columns=SAMPLE_COLUMNS)
            try:
                frame.to_csv(self.path, mode="a", index=False, header=not self.path.is_file())
            except OSError as error:  # which does not say where
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def drifts(self) -> list[float]:
        """By which share each segment's sentinel was off its median over all, at the worse of both sides."""
        middle = median([ms for segment in self.segments for ms in (segment.before, segment.after)] or [1.0])
        return [max(abs(s.before / middle - 1), abs(s.after / middle - 1)) for s in self.segments]

    def by_point(self, tolerance: float = math.inf) -> dict[Point, list[float]]:
        """Samples of each point, without those of segments in which the sentinel drifted more than ``tolerance``."""
        samples: dict[Point, list[float]] = {}
        for segment, drift in zip(self.segments, self.drifts(), strict=True):
            for point, ms in segment.samples.items():
                kept = samples.setdefault(point, [])
                if not drift > tolerance or math.isinf(ms):
                    kept.append(ms)
        return samples

    def due(self, points: Iterable[Point], config: MeasureConfig, on_gpu: bool) -> list[Point]:
        """Points that need another sample.

        On a GPU those with too few steady samples or too wide a spread, until they have twice as many as there are
        rounds; on a CPU those without three of which the two quickest agree, until they have as many.
        """
        taken, steady = self.by_point(), self.by_point(config.drift)

        def is_due(point: Point) -> bool:
            times, good = sorted(taken.get(point, [])), steady.get(point, [])
            if math.inf in times or len(times) >= config.rounds * (2 if on_gpu else 1):
                return False
            if on_gpu:
                return len(good) < config.rounds or spread(good) > config.spread
            return len(times) < 3 or times[1] > (1 + config.spread) * times[0]

        return list(filter(is_due, points))

    def used(self, config: MeasureConfig, on_gpu: bool) -> dict[Point, list[float]]:
        """Each point's samples that count: on a GPU the steady ones, or all where these are few; on a CPU two."""
        taken, steady, few = self.by_point(), self.by_point(config.drift), config.rounds // 2
        if on_gpu:
            return {point: steady[point] if len(steady[point]) > few else times for point, times in taken.items()}
        return {point: sorted(times)[:2] for point, times in taken.items()}  # other programs only ever add to a sample

    def drift_report(self, config: MeasureConfig) -> dict[str, Any]:
        """The drift of the sentinel, for latency.json."""
        drifts = self.drifts()
        beyond = [segment for segment, drift in zip(self.segments, drifts, strict=True) if drift > config.drift]
        return {
            "tolerance": config.drift,
            "worst": round(max(drifts, default=0.0), 5),
            "segments": len(drifts),
            "segments_beyond": len(beyond),
            "points_affected": len({point for segment in beyond for point in segment.samples}),
            "points_left_unsteady": sum(not times for times in self.by_point(config.drift).values()),
        }


def spread(times: Sequence[float]) -> float:
    """How far the 20th and 80th percentiles are apart, as a share of the median."""
    low, middle, high = np.percentile(times, [20, 50, 80])
    return float((high - low) / middle)


def time_points(
    points: Sequence[Point], sentinel: Point, prepare: Prepare, config: MeasureConfig, on_gpu: bool, samples: Samples
) -> None:
    """Times every point until it has enough good samples, or as many as a GPU or a CPU may take."""
    stopwatch, total = _Stopwatch(prepare, on_gpu), config.rounds * len(points)
    rng = random.Random(config.seed + len(samples.segments))

    def done() -> int:
        return sum(config.rounds if math.inf in times else len(times) for times in samples.by_point().values())

    with cpu_threads(torch.get_num_threads() if on_gpu else 1), console.progress_bar("Timing", total) as bar:
        while due := samples.due(points, config, on_gpu):
            total = max(total, done() + len(due))  # what drifted or scattered is timed again
            before = stopwatch.look_at(sentinel)
            for load in _loads(due, on_gpu, config.segment, rng):
                if any([stopwatch.make_ready(point) for point in load]):  # all of them, which is work for a device
                    before = stopwatch.look_at(sentinel)
                while load:
                    times = stopwatch.burst(load)
                    after = stopwatch.look_at(sentinel)
                    samples.add(Segment(before, after, times))
                    load, before = load[len(times) :], after
                    bar(done(), f"drift {max(samples.drifts()):.1%}", total)


def _loads(points: Iterable[Point], on_gpu: bool, most: int, rng: random.Random) -> list[list[Point]]:
    """Points of one load, no more than ``most``, shuffled inside and among each other.

    A GPU draws power by phase, part and shape; embedding and head, of little, go together for all batches, or segments
    would have one sample each.
    """
    loads: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for p in points:
        shape = () if p.part in EMBEDDING_AND_HEAD else (p.batch, p.length)
        loads[(p.phase, p.part, *shape) if on_gpu else (p.phase,)].append(p)
    for load in loads.values():
        rng.shuffle(load)
    segments = [load[begin : begin + most] for load in loads.values() for begin in range(0, len(load), most)]
    rng.shuffle(segments)
    return segments


def _unless_out_of_memory(work: Callable[[], Result]) -> Result | None:
    """What some inference returns; None where it does not fit into memory."""
    try:
        with torch.inference_mode():
            return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


class _Stopwatch:
    """Makes each point ready once, and times it."""

    def __init__(self, prepare: Prepare, on_gpu: bool) -> None:
        self._prepare, self._on_gpu = prepare, on_gpu
        self._timers: dict[Point, Callable[[], float] | None] = {}  # None: does not fit into memory

    def make_ready(self, point: Point) -> bool:
        """What takes a while and is done once; returns whether that was now."""
        if point in self._timers:
            return False
        self._timers[point] = _unless_out_of_memory(partial(self._timer, point))
        return True

    def _timer(self, point: Point) -> Callable[[], float]:
        """What takes a sample of a point, in milliseconds."""
        call, divisor = self._prepare(point)
        if not self._on_gpu:
            return lambda: 1e3 * _cpu_seconds(call) / divisor
        shortest = min([_gpu_seconds(call, 1) for _ in range(3)][1:])  # the first is a warm-up
        repeats = max(1, math.ceil(_SHORTEST_S / max(shortest, 1e-7)))
        return lambda: 1e3 * _gpu_seconds(call, repeats) / divisor

    def burst(self, points: Sequence[Point]) -> dict[Point, float]:
        """A sample each: on a GPU of the first few, no more than it can run evenly after a rest."""
        begun = time.perf_counter()
        self._keep_busy(points, _WARM_UP_S)
        times: dict[Point, float] = {}
        for point in points:
            times[point] = self.sample(point)
            if self._on_gpu and time.perf_counter() - begun > _LONGEST_S:
                break
        return times

    def look_at(self, sentinel: Point) -> float:
        """The median of a few samples of the sentinel, which has to fit into memory all the time."""
        self.make_ready(sentinel)
        self._keep_busy([sentinel], _REST_S)
        ms = median(self.sample(sentinel) for _ in range(3 if self._on_gpu else 1))
        if math.isfinite(ms):
            return ms
        raise UserError(
            f"not even {sentinel.batch} rows of {sentinel.length} tokens with {max(sentinel.groups)} KV groups per "
            "layer fit into memory; lower workload.context, or give smaller measure.batches"
        )

    def sample(self, point: Point) -> float:
        """Milliseconds of one call, divided; infinite where it does not fit into memory."""
        timer = self._timers[point]
        ms = _unless_out_of_memory(timer) if timer else None
        if ms is None:  # for good: what was made ready since may have left it too little
            self._timers[point] = None
            return math.inf
        return ms

    def _keep_busy(self, points: Iterable[Point], seconds: float) -> None:
        """Runs the first point that fits into memory on a GPU; a CPU needs no warm-up."""
        end = time.perf_counter() + seconds
        for point in points if self._on_gpu else ():
            while time.perf_counter() < end and math.isfinite(self.sample(point)):
                pass


def _gpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call, by the GPU's own clock."""

    def repeated() -> None:
        for _ in range(repeats):
            call()

    call()  # a GPU that was left alone for a moment is not at its steady speed
    return milliseconds(repeated) / 1e3 / repeats


def _cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread in the quickest of a few calls."""
    quickest, spent = math.inf, 0.0
    while spent < _SHORTEST_CPU_S:
        begun = time.thread_time()
        call()
        seconds = max(time.thread_time() - begun, 1e-7)  # a clock may be coarse
        quickest, spent = min(quickest, seconds), spent + seconds
    return quickest
