"""The energy of decode steps: measured by NVML's counter while a GPU is kept busy, and a table of it.

The calls are timed between two synchronisations; the power is the mean between the first and the last time that the
counter was seen to move, every 20 to 100 ms. Joules per call are power times seconds per call.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nas.files import read_csv
from nas.hardware import energy_joules, open_gpu

ENERGY = "energy.csv"  # a row per number of groups, the same in every layer, and batch, all at one context
ENERGY_COLUMNS = ["groups", "batch", "length", "watts", "joules_per_step", "seconds", "calls", "method"]

# Either end of the counter's window is seen at most one reading late. It has at least 0.9 × 124 intervals between
# readings, so the mean power is off by less than 1 %.
_BETWEEN_READINGS_S = 0.04
_FEWEST_READINGS = 125
_SPANNED_SHARE = 0.9  # of all readings; a counter that moves for less than that does not count


class Energy(NamedTuple):
    """The energy of one call, as measured over many."""

    watts: float  # mean power of the whole card: what it draws when idle is in it
    joules_per_call: float
    seconds: float  # how long the calls took together
    calls: int


def measure_energy(
    call: Callable[[], object], seconds: float, uuid: str | None, wait: Callable[[], object], warm_up_s: float = 2.0
) -> Energy | None:
    """Runs ``call``, for which the host need not ``wait``, back to back and measures what one takes.

    It runs for at least ``seconds`` and 125 readings, which take 5 s or 125 calls. None where NVML has no such counter,
    or that stands still, is reset or fails on the way.
    """
    with open_gpu(uuid) as read:
        if read(energy_joules) is None:
            return None
        repeats = _warm_up(call, wait, warm_up_s)
        begun, readings = time.perf_counter(), list[tuple[float, float | None]]()
        while time.perf_counter() - begun < seconds or len(readings) < _FEWEST_READINGS:
            for _ in range(repeats):
                call()
            joules = read(energy_joules)  # while the GPU works
            readings.append((time.perf_counter(), joules))
            wait()
        elapsed, calls = time.perf_counter() - begun, repeats * len(readings)
    at, counter = np.array(readings, float).T
    moved = np.diff(counter)  # NaN beside a missing reading, which no comparison lets through
    updates = 1 + np.flatnonzero(moved > 0)
    if (moved < 0).any() or len(updates) < 2 or np.ptp(at[updates]) < _SPANNED_SHARE * np.ptp(at):
        return None
    watts = float(np.ptp(counter[updates]) / np.ptp(at[updates]))
    return Energy(watts, watts * elapsed / calls, elapsed, calls)


def idle_watts(seconds: float, uuid: str | None) -> float | None:
    """Mean power of a GPU that does nothing, which an open CUDA context raises; None where NVML does not tell."""
    idle = measure_energy(lambda: time.sleep(_BETWEEN_READINGS_S), seconds, uuid, lambda: None, warm_up_s=0)
    return idle.watts if idle else None


def _warm_up(call: Callable[[], object], wait: Callable[[], object], seconds: float) -> int:
    """Keeps the GPU busy and returns how many calls it takes from one reading to the next."""
    begun, repeats = time.perf_counter(), 1
    while True:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        fitting = repeats * _BETWEEN_READINGS_S / max(time.perf_counter() - start, 1e-9)
        repeats = max(1, min(2 * repeats, round(fitting)))  # no leap: a first call tells little
        if time.perf_counter() - begun >= seconds:
            return repeats


class EnergyTable:
    """The power of uniform end-to-end models, from energy.csv."""

    def __init__(self, path: Path) -> None:
        table = read_csv(path, ENERGY_COLUMNS, positive=ENERGY_COLUMNS[:-1]).sort_values("batch")
        self._rows = {int(groups): table[table["groups"] == groups] for groups in table["groups"].unique()}

    def knows(self, groups: Iterable[int]) -> bool:
        """Whether all of these numbers of groups were measured."""
        return self._rows.keys() >= set(groups)

    def watts(self, groups: int, batch: int) -> float:
        """Mean power while a model with ``groups`` KV groups in every layer decodes, at any context.

        Beyond the measured batches it is that of the nearest one: no card exceeds its power limit, so a clamp errs less
        than a slope would.
        """
        rows = self._rows[groups]
        return float(np.interp(batch, rows["batch"], rows["watts"]))
