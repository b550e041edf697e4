"""Timing many points fairly: in rounds and shuffled, watched by a sentinel.

A round's points come in segments, and between any two segments a *sentinel*, always the same point, is timed. Samples
are saved per segment, so a killed measurement loses no more than one.

On a GPU that nobody shares, wall time is what counts. Where the sentinel is off its own median by more than the
tolerance, the machine was not itself, and the segments on both sides are timed again; so is a point that scatters. A
segment's points differ in their groups alone (but for embedding and head, a small share of a step, which go together
for all batches), and segments are shuffled, too (randomised blocks): at its power limit a GPU remembers for a tenth of
a second or two what ran before. On an H100 a step right after a prompt took 2.5 % longer than after another step, on an
H200 one after a step of 300 rows 2 % longer than after one of 30, and a layer after an output head 4 %. So each look at
the sentinel, and each segment, begins with a warm-up under its own load. Nor does a segment last: under a heavy load an
H200 ran evenly for 0.6 s, then fell to 13 % below that for 0.4 s, and so on, every 1.2 s. What is timed is the even
speed; how far a lasting load is below it is measured with the energy.

On a CPU, which other programs share, everything runs on one thread, whose own CPU time is read: time in which others
run does not count. What is left of them (caches and memory that they use, too) only ever adds, so a sample is the
quickest of a few calls, and a point is done once it has three samples of which the two quickest agree. Such times are
good for ratios between vectors. They are no latency: serving uses all cores, and shares them.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from statistics import median
from typing import Any

import torch

from nas import console
from nas.config import MeasureConfig
from nas.errors import UserError
from nas.latency.points import EMBEDDING_AND_HEAD, Point
from nas.latency.samples import Samples, Segment, due_on_cpu, due_on_gpu

Prepare = Callable[[Point], tuple[Callable[[], Any], int]]

_SHORTEST_S = {"cuda": 3e-2, "cpu": 1e-2}  # a sample repeats a faster call until it lasts this long
_REST_S = 0.25  # of the sentinel, a light load, before a look at it on a GPU
_WARM_UP_S = 0.1  # of a segment on a GPU
_LONGEST_S = 0.4  # of a segment on a GPU, which has one sample at least
_SENTINEL_SAMPLES = {"cuda": 3, "cpu": 1}


def _gpu_load(point: Point) -> tuple[Any, ...]:
    """What a GPU draws power by; but embedding and head go together, or segments would have one sample each."""
    shape = () if point.part in EMBEDDING_AND_HEAD else (point.batch, point.length)
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
    """Times every point until it has enough good samples, or as many as a GPU or a CPU may take."""
    stopwatch = _Stopwatch(prepare, device)
    rng = random.Random(config.seed + len(samples.segments))
    due_points = due_on_gpu if device.type == "cuda" else due_on_cpu

    def done() -> int:
        return sum(config.rounds if math.inf in times else len(times) for times in samples.by_point().values())

    total = config.rounds * len(points)
    with console.progress_bar("Timing", total) as bar, _threads(1 if device.type == "cpu" else torch.get_num_threads()):
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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loads(points: Iterable[Point], kind: Callable[[Point], Any], most: int, rng: random.Random) -> list[list[Point]]:
    """Points of one kind, no more than ``most``, shuffled inside and among each other."""
    loads: dict[Any, list[Point]] = {}
    for point in points:
        loads.setdefault(kind(point), []).append(point)
    for load in loads.values():
        rng.shuffle(load)
    segments = [load[begin : begin + most] for load in loads.values() for begin in range(0, len(load), most)]
    rng.shuffle(segments)
    return segments


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
        self._prepare, self._device = prepare, device.type
        self._ready: dict[Point, tuple[Callable[[], Any], int, int] | None] = {}  # call, repeats, divisor

    def make_ready(self, point: Point) -> bool:
        """What takes a while and is done once; whether that was now."""
        if point in self._ready:
            return False
        self._ready[point] = None  # until it is found to fit into memory
        with suppress(torch.OutOfMemoryError), memory_watched(), torch.inference_mode():
            (call, divisor), repeats = self._prepare(point), 1
            if self._device == "cuda":
                shortest = min([_gpu_seconds(call, 1) for _ in range(3)][1:])  # the first is a warm-up
                repeats = max(1, math.ceil(_SHORTEST_S["cuda"] / max(shortest, 1e-7)))
            self._ready[point] = call, repeats, divisor
        return True

    def burst(self, points: Sequence[Point]) -> dict[Point, float]:
        """A sample each: on a GPU of the first few, no more than it can run evenly after a rest."""
        begun = time.perf_counter()
        self._keep_busy(points, _WARM_UP_S)
        times: dict[Point, float] = {}
        for point in points:
            times[point] = self.sample(point)
            if self._device == "cuda" and time.perf_counter() - begun > _LONGEST_S:
                break
        return times

    def look_at(self, sentinel: Point) -> float:
        """The median of a few samples of the sentinel, which has to fit into memory all the time."""
        self.make_ready(sentinel)
        self._keep_busy([sentinel], _REST_S)
        milliseconds = median(self.sample(sentinel) for _ in range(_SENTINEL_SAMPLES[self._device]))
        if math.isfinite(milliseconds):
            return milliseconds
        raise UserError(
            f"not even {sentinel.batch} rows of {sentinel.length} tokens with {max(sentinel.groups)} KV groups per "
            "layer fit into memory; lower workload.context, or give smaller measure.batches"
        )

    def sample(self, point: Point) -> float:
        """Milliseconds of one call, divided; infinite where it does not fit into memory."""
        if (ready := self._ready[point]) is None:
            return math.inf
        call, repeats, divisor = ready
        try:
            with memory_watched(), torch.inference_mode():
                seconds = _gpu_seconds(call, repeats) if self._device == "cuda" else _cpu_seconds(call)
                return 1e3 * seconds / divisor
        except torch.OutOfMemoryError:  # what was made ready since has left it too little
            self._ready[point] = None
            return math.inf

    def _keep_busy(self, points: Iterable[Point], seconds: float) -> None:
        """Runs the first point that fits into memory on a GPU; a CPU needs no warm-up."""
        end = time.perf_counter() + seconds
        for point in points if self._device == "cuda" else ():
            while time.perf_counter() < end and math.isfinite(self.sample(point)):
                pass


def _gpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call, by the GPU's own clock."""
    call()  # a GPU that was left alone for a moment is not at its steady speed
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def _cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread in the quickest of a few calls."""
    quickest, spent = math.inf, 0.0
    while spent < _SHORTEST_S["cpu"]:
        begun = time.thread_time()
        call()
        seconds = max(time.thread_time() - begun, 1e-7)  # a clock may be coarse
        quickest, spent = min(quickest, seconds), spent + seconds
    return quickest
