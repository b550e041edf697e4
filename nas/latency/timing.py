"""Timing many points fairly: in rounds and shuffled, watched by a sentinel, always the same point, between segments.

On a GPU wall time counts. At its power limit it remembers for a tenth of a second or two what ran before: on an H100 a
step right after a prompt took 2.5 % longer, on an H200 one after a step of 300 rows 2 % longer than after one of 30,
and a layer after an output head 4 %. So a segment is of one load and begins with a warm-up under it, as a look at the
sentinel does. Nor does it last: an H200 under a heavy load ran evenly for 0.6 s, then fell to 13 % below that for
0.4 s, and so on. What is timed is the even speed; how far a lasting load is below it is measured with the energy.

On a CPU, which other programs share, everything runs on one thread, whose own CPU time is read. What is left of them
(caches and memory that they use, too) only ever adds, so a sample is the quickest of a few calls. Such times are good
for ratios between vectors. They are no latency: serving uses all cores, and shares them.
"""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import torch

from nas import console
from nas.config import MeasureConfig
from nas.errors import UserError
from nas.latency.points import EMBEDDING_AND_HEAD, Point
from nas.latency.samples import Samples, Segment
from nas.serving.runtime import milliseconds

Prepare = Callable[[Point], tuple[Callable[[], Any], int]]

_SHORTEST_S, _SHORTEST_CPU_S = 3e-2, 1e-2  # a sample repeats a faster call until it lasts this long
_REST_S = 0.25  # of the sentinel, a light load, before a look at it on a GPU
_WARM_UP_S = 0.1  # of a segment on a GPU
_LONGEST_S = 0.4  # of a segment on a GPU, which has one sample at least


def time_points(
    points: Sequence[Point], sentinel: Point, prepare: Prepare, config: MeasureConfig, on_gpu: bool, samples: Samples
) -> None:
    """Times every point until it has enough good samples, or as many as a GPU or a CPU may take."""
    stopwatch, threads, total = _Stopwatch(prepare, on_gpu), torch.get_num_threads(), config.rounds * len(points)
    rng = random.Random(config.seed + len(samples.segments))

    def done() -> int:
        return sum(config.rounds if math.inf in times else len(times) for times in samples.by_point().values())

    torch.set_num_threads(threads if on_gpu else 1)
    try:
        with console.progress_bar("Timing", total) as bar:
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
    finally:
        torch.set_num_threads(threads)


def _loads(points: Iterable[Point], on_gpu: bool, most: int, rng: random.Random) -> list[list[Point]]:
    """Points of one load, no more than ``most``, shuffled inside and among each other.

    A GPU draws power by phase, part and shape. Embedding and head, a small share of a step, go together for all
    batches, or segments would have one sample each.
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

    def __init__(self, prepare: Prepare, on_gpu: bool) -> None:
        self._prepare, self._on_gpu = prepare, on_gpu
        self._ready: dict[Point, tuple[Callable[[], Any], int, int] | None] = {}  # call, repeats, divisor

    def make_ready(self, point: Point) -> bool:
        """What takes a while and is done once; whether that was now."""
        if point in self._ready:
            return False
        self._ready[point] = None  # until it is found to fit into memory
        with suppress(torch.OutOfMemoryError), memory_watched(), torch.inference_mode():
            (call, divisor), repeats = self._prepare(point), 1
            if self._on_gpu:
                shortest = min([_gpu_seconds(call, 1) for _ in range(3)][1:])  # the first is a warm-up
                repeats = max(1, math.ceil(_SHORTEST_S / max(shortest, 1e-7)))
            self._ready[point] = call, repeats, divisor
        return True

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
        milliseconds = median(self.sample(sentinel) for _ in range(3 if self._on_gpu else 1))
        if math.isfinite(milliseconds):
            return milliseconds
        raise UserError(
            f"not even {sentinel.batch} rows of {sentinel.length} tokens with {max(sentinel.groups)} KV groups per "
            "layer fit into memory; lower workload.context, or give smaller measure.batches"
        )

    def sample(self, point: Point) -> float:
        """Milliseconds of one call, divided; infinite where it does not fit into memory."""
        if ready := self._ready[point]:
            call, repeats, divisor = ready
            with suppress(torch.OutOfMemoryError), memory_watched(), torch.inference_mode():
                return 1e3 * (_gpu_seconds(call, repeats) if self._on_gpu else _cpu_seconds(call)) / divisor
            self._ready[point] = None  # what was made ready since has left it too little
        return math.inf

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
