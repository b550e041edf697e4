"""The energy of decode steps: measured by NVML's counter while a GPU is kept busy, and a table of it.

The calls are timed between two synchronisations; the power is the mean between the first and the last time that the
counter was seen to move. Joules per call are power times seconds per call, so the calls need not begin and end with
updates of the counter, which come only every 20 to 100 ms.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.integrate import trapezoid

from nas.csv_files import positive_numbers, read_csv, require
from nas.hardware import Gpu

ENERGY = "energy.csv"  # a row per number of groups, the same in every layer, and batch, all at one context
ENERGY_COLUMNS = ["groups", "batch", "length", "watts", "joules_per_step", "seconds", "calls", "method"]

# Either end of the counter's window is seen at most one reading late. It has at least 0.9 × 124 intervals between
# readings, so the mean power is off by less than 1 %.
_BETWEEN_READINGS_S = 0.04
_FEWEST_READINGS = 125
_SPANNED_SHARE = 0.9  # of all readings; a sensor that answers for less than that does not count


@dataclass(frozen=True)
class Energy:
    """The energy of one call, as measured over many."""

    watts: float  # mean power of the whole card: what it draws when idle is in it
    joules_per_call: float
    seconds: float  # how long the calls took together
    calls: int
    method: str  # ``energy counter``, or ``power × time`` where there is no such counter


def measure_energy(
    call: Callable[[], object],
    seconds: float,
    uuid: str | None,
    synchronise: Callable[[], object],
    warm_up_s: float = 2.0,
) -> Energy | None:
    """Runs ``call``, which need not wait for the GPU, back to back and measures what one takes.

    It runs for at least ``seconds`` and 125 readings, which take 5 s or 125 calls. The warm-up takes at least 1 s, as
    NVML's power may be the mean of the last second. None where NVML has no sensor, or all fail on the way.
    """
    with Gpu(uuid) as gpu:
        if gpu.read("energy_joules") is None and gpu.read("power_watts") is None:
            return None
        repeats = _warm_up(call, synchronise, warm_up_s)
        begun, readings = time.perf_counter(), list[tuple[float, float | None, float | None]]()
        while time.perf_counter() - begun < seconds or len(readings) < _FEWEST_READINGS:
            for _ in range(repeats):
                call()
            # Before the synchronisation: the GPU works while NVML takes its time.
            joules, now, watts = gpu.read("energy_joules"), time.perf_counter(), gpu.read("power_watts")
            readings.append((now, joules, watts))
            synchronise()
        elapsed, calls = time.perf_counter() - begun, repeats * len(readings)
    if (power := _mean_power(np.array(readings, float))) is None:  # NaN where NVML did not answer
        return None
    mean_watts, method = power
    return Energy(mean_watts, mean_watts * elapsed / calls, elapsed, calls, method)


def idle_watts(seconds: float, uuid: str | None) -> float | None:
    """Mean power of a GPU that does nothing, over at least ``seconds`` and 5 s; None where NVML does not tell.

    A card with an open CUDA context draws more than one without. The first is what serving pays for between
    requests, so ask once the context is open and before anything runs.
    """
    idle = measure_energy(lambda: time.sleep(_BETWEEN_READINGS_S), seconds, uuid, lambda: None, warm_up_s=0)
    return idle and idle.watts


def _warm_up(call: Callable[[], object], synchronise: Callable[[], object], seconds: float) -> int:
    """Keeps the GPU busy, and finds out how many calls it takes from one reading to the next."""
    begun, repeats = time.perf_counter(), 1
    while True:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronise()
        fitting = repeats * _BETWEEN_READINGS_S / max(time.perf_counter() - start, 1e-9)
        repeats = max(1, min(2 * repeats, round(fitting)))  # no leap: a first call tells little
        if time.perf_counter() - begun >= seconds:
            return repeats


def _mean_power(readings: np.ndarray) -> tuple[float, str] | None:
    """Mean watts, and by which method."""
    times, joules, watts = readings.T
    moved = np.diff(joules)  # NaN beside a missing reading, which no comparison below lets through
    updates = 1 + np.flatnonzero(moved > 0)
    if not (moved < 0).any() and _spans(times, updates):  # it falls when the driver is loaded anew
        first, last = updates[[0, -1]]
        return float((joules[last] - joules[first]) / (times[last] - times[first])), "energy counter"
    known = np.flatnonzero(watts > 0)
    if _spans(times, known):
        return float(trapezoid(watts[known], times[known]) / np.ptp(times[known])), "power × time"
    return None


def _spans(times: np.ndarray, known: np.ndarray) -> bool:
    return len(known) > 1 and bool(np.ptp(times[known]) >= _SPANNED_SHARE * np.ptp(times))


class EnergyTable:
    """Energy of vectors, put together from the power of uniform end-to-end models in energy.csv."""

    def __init__(self, path: Path) -> None:
        table = read_csv(path, ENERGY_COLUMNS).sort_values("batch")
        require(path, table, positive_numbers(table, ENERGY_COLUMNS[:-1]), "its numbers must be positive")
        self._rows = {int(groups): table[table["groups"] == groups] for groups in table["groups"].unique()}

    def knows(self, groups: Iterable[int]) -> bool:
        """Whether all of these numbers of groups were measured."""
        return self._rows.keys() >= set(groups)

    def watts(self, groups: int, batch: int) -> float:
        """Mean power while a model with ``groups`` KV groups in every layer decodes, at any context.

        Beyond the measured batches it is that of the nearest one: power varies little from point to point, and no card
        exceeds its limit, so a clamp errs less than a slope would.
        """
        rows = self._rows[groups]
        return float(np.interp(batch, rows["batch"], rows["watts"]))

    def joules_per_step(
        self, vector: Sequence[int], batch: int, layer_ms: Callable[[int], float], embedding_and_head_ms: float
    ) -> float:
        """Energy of a decode step: each layer, with its share of embedding and head, at its uniform model's power."""
        share_ms = embedding_and_head_ms / len(vector)
        counts = Counter(vector).items()
        return math.fsum(n * self.watts(groups, batch) * (layer_ms(groups) + share_ms) for groups, n in counts) / 1e3
