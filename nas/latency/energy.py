"""The energy of decode steps: measured by NVML's counter while a GPU is kept busy, and a table of it.

The calls are timed between two synchronisations; the power is the mean between the first and the last time that the
counter was seen to move. Joules per call are power times seconds per call, so the calls need not begin and end with
updates of the counter, which come only every 20 to 100 ms.

energy.csv has one row per point: ``groups, batch, length, watts, joules_per_step, seconds, calls, method``, measured on
end-to-end models with the same ``groups`` in every layer.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from nas.csv_files import positive_numbers, read_csv, require
from nas.errors import UserError
from nas.hardware import Gpu

ENERGY = "energy.csv"
ENERGY_COLUMNS = ["groups", "batch", "length", "watts", "joules_per_step", "seconds", "calls", "method"]

# Either end of the counter's window is seen at most one reading late. It has at least 0.9 × 124 intervals between
# readings, so the mean power is off by less than 1 %.
_BETWEEN_READINGS_S = 0.04
_FEWEST_READINGS = 125
_SPANNED_SHARE = 0.9  # of all readings; a sensor that answers for less than that does not count


@dataclass(frozen=True)
class Energy:
    """The energy of one call, as measured over many."""

    joules_per_call: float  # of the whole card: what it draws when idle is in it
    seconds: float  # how long the calls took together
    calls: int  # how many they were
    watts: float  # mean power
    method: str  # ``energy counter``, or ``power × time`` where there is no such counter


def measure_energy(
    call: Callable[[], object],
    seconds: float,
    uuid: str | None,
    synchronise: Callable[[], object],
    *,
    warm_up_s: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy | None:
    """Runs ``call``, which need not wait for the GPU, back to back and measures what one takes.

    It runs for at least ``seconds`` and 125 readings, which take 5 s or 125 calls. The warm-up takes at least 1 s, as
    NVML's power may be the mean of the last second. None where NVML has no sensor, or all fail on the way.
    """
    with Gpu(uuid) as gpu:
        if not _has_sensor(gpu):
            return None
        repeats = _warm_up(call, synchronise, warm_up_s, clock)

        def enqueue() -> None:
            for _ in range(repeats):
                call()

        begun = clock()
        readings = _read(gpu, seconds, enqueue, synchronise, clock)
        elapsed, calls = clock() - begun, repeats * len(readings)
    if (power := _mean_power(readings)) is None:
        return None
    watts, method = power
    return Energy(watts * elapsed / calls, elapsed, calls, watts, method)


def idle_watts(
    seconds: float,
    uuid: str | None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> float | None:
    """Mean power of a GPU that does nothing, over at least ``seconds`` and 5 s; None where NVML does not tell.

    A card with an open CUDA context draws more than one without. The first is what serving pays for between
    requests, so ask once the context is open and before anything runs.
    """
    with Gpu(uuid) as gpu:
        if not _has_sensor(gpu):
            return None
        power = _mean_power(_read(gpu, seconds, lambda: None, lambda: sleep(_BETWEEN_READINGS_S), clock))
    return power and power[0]


def _has_sensor(gpu: Gpu) -> bool:
    return any(gpu.read(query) is not None for query in ("energy_joules", "power_watts"))


def _warm_up(
    call: Callable[[], object], synchronise: Callable[[], object], seconds: float, clock: Callable[[], float]
) -> int:
    """Keeps the GPU busy, and finds out how many calls it takes from one reading to the next."""
    begun, repeats = clock(), 1
    while True:
        start = clock()
        for _ in range(repeats):
            call()
        synchronise()
        fitting = repeats * _BETWEEN_READINGS_S / max(clock() - start, 1e-9)
        repeats = max(1, min(2 * repeats, round(fitting)))  # no leap: a first call tells little
        if clock() - begun >= seconds:
            return repeats


def _read(
    gpu: Gpu, seconds: float, enqueue: Callable[[], object], wait: Callable[[], object], clock: Callable[[], float]
) -> list[list[float]]:
    """Reads the sensors between ``enqueue`` and ``wait``, again and again: the GPU works while NVML takes its time.

    A reading is seconds, joules and watts; these two are NaN where NVML did not answer.
    """
    begun, readings = clock(), list[list[float]]()
    while clock() - begun < seconds or len(readings) < _FEWEST_READINGS:
        enqueue()
        joules, now, watts = gpu.read("energy_joules"), clock(), gpu.read("power_watts")
        readings.append([now, *(math.nan if value is None else value for value in (joules, watts))])
        wait()
    return readings


def _mean_power(readings: list[list[float]]) -> tuple[float, str] | None:
    """Mean watts, and by which method."""
    times, joules, watts = np.array(readings).T
    moved = np.diff(joules)  # NaN beside a missing reading, which no comparison below lets through
    updates = 1 + np.flatnonzero(moved > 0)
    if not (moved < 0).any() and _spans(times, updates):  # it falls when the driver is loaded anew
        first, last = updates[[0, -1]]
        return float((joules[last] - joules[first]) / (times[last] - times[first])), "energy counter"
    known = np.flatnonzero(watts > 0)
    if _spans(times, known):
        when = times[known]
        return float(trapezoid(watts[known], when) / (when[-1] - when[0])), "power × time"
    return None


def _spans(times: np.ndarray, known: np.ndarray) -> bool:
    return len(known) > 1 and times[known[-1]] - times[known[0]] >= _SPANNED_SHARE * (times[-1] - times[0])


class EnergyTable:
    """Energy of vectors, put together from the power of uniform end-to-end models in energy.csv."""

    def __init__(self, path: Path) -> None:
        self.path = path
        table = read_csv(path, ENERGY_COLUMNS)
        require(path, table, positive_numbers(table, ENERGY_COLUMNS[:-1]), "its numbers must be positive")
        if table.empty:
            raise UserError(f"{path} is corrupt (no row at all); measure again")
        self._grids: dict[int, pd.DataFrame] = {}  # by groups: watts, a row per batch and a column per length
        for groups, rows in table.groupby("groups"):
            grid = rows.pivot_table(index="batch", columns="length", values="watts")
            if grid.size != len(rows) or grid.isna().to_numpy().any():
                reason = f"{groups:g} groups need every batch at every length once"
                raise UserError(f"{path} is corrupt ({reason}); restore it")
            self._grids[int(float(str(groups)))] = grid

    def knows(self, groups: Iterable[int]) -> bool:
        """Whether all of these numbers of groups were measured."""
        return self._grids.keys() >= set(groups)

    def watts(self, groups: int, batch: int, length: int) -> float:
        """Mean power while a model with ``groups`` KV groups in every layer decodes.

        Bilinear in batch and length. Beyond the measured range it is that of the nearest edge: power varies little
        from point to point, and no card exceeds its limit, so a clamp errs less than a slope would.
        """
        if groups not in self._grids:
            raise UserError(f"{self.path} has no power for {groups} groups; measure this space")
        grid = self._grids[groups]
        by_batch = [np.interp(length, grid.columns, row) for row in grid.to_numpy()]
        return float(np.interp(batch, grid.index, by_batch))

    def joules_per_step(
        self,
        vector: Sequence[int],
        batch: int,
        length: int,
        layer_ms: Callable[[int], float],
        embedding_and_head_ms: float,
    ) -> float:
        """Energy of a decode step of a model: Σ watts(g) · layer_ms(g) + mean watts · embedding_and_head_ms.

        Each layer takes its time at the power of the uniform model of its groups.
        """
        counts = sorted(Counter(vector).items())  # in one order: equal counts cost the same to the last bit
        watts = {groups: self.watts(groups, batch, length) for groups, _ in counts}
        layers = math.fsum(count * watts[groups] * layer_ms(groups) for groups, count in counts)
        mean = math.fsum(count * watts[groups] for groups, count in counts) / len(vector)
        return (layers + mean * embedding_and_head_ms) / 1e3
