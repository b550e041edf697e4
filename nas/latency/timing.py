"""Timing many points fairly: in rounds and shuffled, watched by a sentinel, until each one's spread is small.

A round's points come in segments, and between any two segments a *sentinel*, always the same point, is timed. Where it
is off its own median by more than the tolerance, the machine was not itself, and the segments on both sides are timed
again. Samples are written down a segment at a time, so a killed measurement loses no more than one.

On a GPU a segment's points differ in their groups alone (but for a model's ends, a small share of a step, which go
together for all batches), and segments are shuffled, too (randomised blocks): at its power limit it remembers for a
tenth of a second or two what ran before. On an H100 a step right after a prompt took 2.5 % longer than after another
step, on an H200 one after a step of 300 rows 2 % longer than after one of 30, and a layer after an output head 4 %. So
each look at the sentinel, and each segment, begins with a warm-up under its own load. Nor does a segment last: under a
heavy load an H200 ran evenly for 0.6 s, then fell to 13 % below that for 0.4 s, and so on, every 1.2 s. What is timed
is the even speed; how far a lasting load is below it is measured with the energy.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from statistics import median
from typing import Any

import torch

from nas import console
from nas.config import MeasureConfig
from nas.errors import UserError
from nas.latency.points import ENDS, Point
from nas.latency.samples import Samples, Segment, due_points

Prepare = Callable[[Point], tuple[Callable[[], Any], int]]

_SHORTEST_S = {"cuda": 3e-2, "cpu": 1e-2}  # a sample repeats a faster call until it lasts this long
_REST_S = {"cuda": 0.25, "cpu": 0.01}  # of the sentinel, a light load, before a look at it
_WARM_UP_S = {"cuda": 0.1, "cpu": 0.05}  # of a segment
_LONGEST_S = {"cuda": 0.4, "cpu": math.inf}  # of a segment, which has one sample at least
_SENTINEL_SAMPLES = 3


def _gpu_load(point: Point) -> tuple[Any, ...]:
    """What a GPU draws power by; but a model's ends go together, which would fill segments with one sample each."""
    shape = () if point.part in ENDS else (point.batch, point.length)
    return point.phase, point.part, *shape


_LOAD: dict[str, Callable[[Point], Any]] = {"cuda": _gpu_load, "cpu": attrgetter("phase")}  # of all points of a segment


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
    with console.progress_bar("Timing", total) as bar:
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
