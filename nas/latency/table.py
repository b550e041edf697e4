"""A measured latency table: a CSV of times and a JSON that says what they mean.

table.csv has one row a point: ``phase, part, groups, batch, length, median_ms, p20_ms, p80_ms, n, status``. ``part`` is
``layer`` (one layer with ``groups`` KV groups), ``embedding`` or ``head`` (groups 0); status is ``ok``, or
``out_of_memory`` for a point that did not fit and has no times. latency.json holds the device, shape, dtype, runtime,
versions, date, what the sentinel saw, and how far the predictor was from whole models.

Between points, times are interpolated where physics makes them straight. A decode step's time grows with the bytes that
it moves: at one batch in proportion to the context, and from batch to batch likewise. A pass of prompts takes time with
its operations: at one prompt length in proportion to its tokens, and at as many tokens linearly in the length. Outside
the measured range nothing is said, unless that is asked for; then the outermost slopes are prolonged.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from nas.csv_files import positive_numbers, read_csv, require, whole_numbers
from nas.errors import UserError
from nas.files import file_hash, read_json
from nas.latency.accuracy import CHECK, CHECK_COLUMNS, phase_errors
from nas.latency.energy import ENERGY, EnergyTable
from nas.latency.points import ENDS
from nas.latency.predictor import PHASES, STEP_REVISION, Phase, Workload
from nas.serving.batching import prefill_chunks
from nas.shape import FEATURES, ModelShape
from nas.space import SearchSpace

TABLE, META = "table.csv", "latency.json"
COLUMNS = ["phase", "part", "groups", "batch", "length", "median_ms", "p20_ms", "p80_ms", "n", "status"]
OK, OUT_OF_MEMORY = "ok", "out_of_memory"
_META_TYPES = {
    "check": list,
    "date": str,
    "device": dict,
    "dtype": str,
    "runtime": str,
    "shape": dict,
    "workload": dict,
}
_CHECK_KEYS = {"phase", "batch", "length", "n", "mape", "worst"}
_SHAPE_KEYS = ("hidden_size", "num_attention_heads", "head_dim", "intermediate_size", "vocab_size")
_NO_DRIFT = {"segments": 0, "segments_beyond": 0, "worst": 0.0}
_TOLD_SLOWER = 0.005


def layer_shape(shape: ModelShape) -> dict[str, int]:
    """The part of a shape that a table depends on: not the number of layers, nor the rotary embeddings' values."""
    features = [key for key in FEATURES if key != "rope_scaling" and getattr(shape, key)]
    return {key: getattr(shape, key) for key in (*_SHAPE_KEYS, *features)}


def _wrong_key(meta: dict[str, Any]) -> str | None:
    """The first key of a latency.json that is not what `nas measure` writes."""
    for key, kind in _META_TYPES.items():
        if not isinstance(meta.get(key), kind):
            return key
    if not all(isinstance(meta["device"].get(key), str) for key in ("name", "slug")):
        return "device"
    if not isinstance(meta.get("step_revision", 1), int):
        return "step_revision"
    drift = meta.get("drift", _NO_DRIFT)
    if not (isinstance(drift, dict) and all(isinstance(drift.get(key), int | float) for key in _NO_DRIFT)):
        return "drift"
    loads = meta.get("lasting_load", [])  # only where energy was measured
    if not (
        isinstance(loads, list) and all(isinstance(load, dict) and _is_positive(load.get("ratio")) for load in loads)
    ):
        return "lasting_load"
    return None if all(isinstance(some, dict) and some.keys() >= _CHECK_KEYS for some in meta["check"]) else "check"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


class TableLatency:
    """Latency model from a measured table.

    Args:
        folder: Holds table.csv and latency.json.
        extrapolate: Answer outside the measured range too, which makes it an estimate.

    Raises:
        UserError: A file is missing or corrupt.
    """

    def __init__(self, folder: Path, extrapolate: bool = False) -> None:
        self.folder, self._extrapolate = folder, extrapolate
        self.source = "estimated" if extrapolate else "measured"
        self.meta: dict[str, Any] = read_json(folder / META)
        if wrong := _wrong_key(self.meta):
            raise UserError(f"{folder / META} is corrupt ({wrong} is missing or wrong); restore it or measure again")
        table = read_csv(folder / TABLE, COLUMNS)
        known = table["phase"].isin(PHASES) & table["part"].isin(["layer", *ENDS])
        known &= whole_numbers(table, ["groups", "batch", "length"]) & table["status"].isin([OK, OUT_OF_MEMORY])
        fitted = table["status"] == OK
        good = known & positive_numbers(table, ["batch", "length"]) & (positive_numbers(table, ["median_ms"]) | ~fitted)
        require(folder / TABLE, table, good, "a key is unknown, or a number not positive")
        if not fitted.any():
            raise UserError(f"{folder / TABLE} is corrupt (no row that fitted into memory); measure again")
        table = table[fitted]
        self._surfaces = {
            key: _Surface(rows, str(rows["phase"].iloc[0]), f"{folder / TABLE}")
            for key, rows in table.groupby(["phase", "part", "groups"])
        }

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        return self._at(phase, "layer", groups, batch, length)

    def embedding_and_head_ms(self, phase: Phase, batch: int, length: int) -> float:
        return sum(self._at(phase, part, 0, batch, length if phase == "prefill" else 1) for part in ENDS)

    def describe(self) -> str:
        words = f"measured on {self.meta['device']['name']} on {self.meta['date'][:10]}"
        errors = {phase: phase_errors(self.meta["check"], phase) for phase in PHASES}
        known = {phase: error for phase, error in errors.items() if error}
        if known:
            told = ", ".join(f"{phase} {mean:.1%} (worst {worst:.1%})" for phase, (mean, worst) in known.items())
            shapes = {phase: [s for s in self.meta["check"] if s["phase"] == phase] for phase in known}
            where = "; ".join(
                f"{phase} at " + ", ".join(f"{s['batch']} x {s['length']}" for s in some)
                for phase, some in shapes.items()
            )
            models = max(s["n"] for s in self.meta["check"])
            words += f"; mean error {told} over {models} whole models ({where} tokens)"
        slower = max((load["ratio"] for load in self.meta.get("lasting_load", [])), default=1.0) - 1
        if slower >= _TOLD_SLOWER and self.meta["runtime"] != "eager":  # whose steps depend on the host
            words += f"; steps that follow one another for seconds took up to {slower:.1%} longer"
        drift = self.meta.get("drift", _NO_DRIFT)
        if (beyond := drift["segments_beyond"]) > drift["segments"] / 2:  # too many to be redone
            words += f"; the machine drifted in {beyond} of {drift['segments']} segments, by up to {drift['worst']:.0%}"
        if not self.is_current:
            words += "; decode steps were of an earlier version of this software, so may be off by a tenth at few rows"
        return words + ("; extrapolated beyond the measured range" if self._extrapolate else "")

    @property
    def is_current(self) -> bool:
        """Whether its decode steps were what they are now."""
        return bool(self.meta.get("step_revision", 1) >= STEP_REVISION.get(self.meta["runtime"], 1))

    def digest(self) -> str:
        """Hash of the times."""
        return file_hash(self.folder / TABLE)

    def check(self) -> pd.DataFrame:
        """The whole models that the table was checked against: `CHECK_COLUMNS`.

        Raises:
            UserError: check.csv is missing or corrupt.
        """
        check = read_csv(self.folder / CHECK, CHECK_COLUMNS)
        good = positive_numbers(check, CHECK_COLUMNS[2:])
        require(self.folder / CHECK, check, good, "its numbers must be positive")
        return check

    def energy(self) -> EnergyTable | None:
        """The power of decode steps, where it was measured.

        Raises:
            UserError: energy.csv is corrupt.
        """
        return EnergyTable(self.folder / ENERGY) if (self.folder / ENERGY).is_file() else None

    def extrapolating(self) -> Self:
        """The same table, answering outside its range too."""
        return type(self)(self.folder, extrapolate=True)

    def fits(self, device: str, space: SearchSpace, workload: Workload, batches: Iterable[int]) -> bool:
        """Whether the table is of a device, shape and runtime, and covers batches of a workload."""
        same = (self.meta["device"]["slug"], self.meta["shape"], self.meta["dtype"], self.meta["runtime"])
        if same != (device, layer_shape(space.shape), workload.dtype, workload.runtime):
            return False
        try:
            for batch in batches:
                self.embedding_and_head_ms("decode", batch, 1)
                for groups in set().union(*space.choices):
                    self.layer_ms("decode", groups, batch, workload.context)
                    for rows in set(prefill_chunks(batch, workload.prompt)):
                        self.layer_ms("prefill", groups, rows, workload.prompt)
        except UserError:
            return False
        return True

    def _at(self, phase: str, part: str, groups: int, batch: int, length: int) -> float:
        if (phase, part, groups) not in self._surfaces:
            what = f"{groups} groups" if part == "layer" else part
            raise UserError(f"{self.folder / TABLE} has no {phase} times for {what}; measure this space")
        surface = self._surfaces[phase, part, groups]
        within = surface.covers(batch, length)
        if not self._extrapolate and not within:
            raise UserError(
                f"{self.folder / TABLE} covers {surface.range()} in {phase}, not batch {batch} and length {length}; "
                "measure that workload, or allow extrapolate=true"
            )
        ms = surface.ms(batch, length, within)
        if ms <= 0:
            raise UserError(
                f"{self.folder / TABLE} covers {surface.range()} in {phase}: too little to be extrapolated to batch "
                f"{batch} and length {length}; measure that workload"
            )
        return ms


class _Surface:
    """Times of one part, over an outer and an inner coordinate along which they are straight.

    Of decode those are batch and length; of prefill they are length and tokens, batch times length.
    """

    def __init__(self, rows: pd.DataFrame, phase: str, where: str) -> None:
        self._prefill = phase == "prefill"
        rows = rows[["batch", "length", "median_ms"]].astype(float)
        rows = rows.assign(tokens=rows["batch"] * rows["length"])
        outer, self._inner = ("length", "tokens") if self._prefill else ("batch", "length")
        if rows.duplicated([outer, self._inner]).any():
            raise UserError(f"{where} is corrupt ({phase} has a point twice); restore it or measure again")
        self._lines = {float(str(value)): line.sort_values(self._inner) for value, line in rows.groupby(outer)}
        self._outer = np.array(list(self._lines))
        # Beyond what was measured a line of one point, which memory left, has no slope to prolong.
        sloped = [value for value, line in self._lines.items() if self._prefill or len(line) > 1]
        self._sloped = np.array(sloped or list(self._lines))

    def ms(self, batch: int, length: int, within: bool) -> float:
        """The time at a batch and length, which the measured points surround or not."""
        outer, inner = self._coordinates(batch, length)
        values = _neighbours(self._outer if within else self._sloped, outer)
        return _along(np.array(values), np.array([self._on_line(value, inner) for value in values]), outer)

    def covers(self, batch: int, length: int) -> bool:
        """Whether the measured points surround these."""
        outer, inner = self._coordinates(batch, length)
        if not self._outer[0] <= outer <= self._outer[-1]:
            return False
        # A pass of prompts is within when it has no fewer rows than were measured, and no more rows or no more tokens.
        low, within = ("batch", {"batch": batch, "tokens": inner}) if self._prefill else ("length", {"length": inner})
        return all(
            line[low].min() <= within[low] and any(value <= line[axis].max() for axis, value in within.items())
            for line in (self._lines[value] for value in _neighbours(self._outer, outer))
        )

    def range(self) -> str:
        """The measured range in words."""
        inner = pd.concat([line[self._inner] for line in self._lines.values()])
        first = "length" if self._prefill else "batch"
        return (
            f"{first} {self._outer[0]:g} to {self._outer[-1]:g} and {self._inner} {inner.min():g} to {inner.max():g} "
            "(less where memory ended)"
        )

    def _coordinates(self, batch: int, length: int) -> tuple[float, float]:
        return (float(length), float(batch * length)) if self._prefill else (float(batch), float(length))

    def _on_line(self, value: float, inner: float) -> float:
        line = self._lines[value]
        coordinates, times = line[self._inner].to_numpy(float), line["median_ms"].to_numpy(float)
        if self._prefill and len(line) == 1:  # prompts so long that they go alone: as much time for each token
            return float(times[0] * inner / coordinates[0])
        return _along(coordinates, times, inner)


def _neighbours(values: np.ndarray, at: float) -> list[float]:
    """Those on either side: one where it is one of them, or there is no other."""
    if at in values or len(values) == 1:
        return [at if at in values else float(values[0])]
    right = int(np.clip(np.searchsorted(values, at), 1, len(values) - 1))
    return values[right - 1 : right + 1].tolist()  # type: ignore[no-any-return]


def _along(coordinates: np.ndarray, times: np.ndarray, at: float) -> float:
    """Linear interpolation, and beyond the ends the slope of the last two."""
    if len(coordinates) == 1:
        return float(times[0])
    right = int(np.clip(np.searchsorted(coordinates, at), 1, len(coordinates) - 1))
    (x0, x1), (y0, y1) = coordinates[right - 1 : right + 1], times[right - 1 : right + 1]
    return float(y0 + (y1 - y0) * (at - x0) / (x1 - x0))


def summarise(times_ms: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile in milliseconds, how many, and whether it ever fitted into memory.

    Infinite times are of attempts that found too little.
    """
    fitted = [ms for ms in times_ms if ms < math.inf]
    if not fitted:
        return {"median_ms": np.nan, "p20_ms": np.nan, "p80_ms": np.nan, "n": 0, "status": OUT_OF_MEMORY}
    p20, middle, p80 = np.percentile(fitted, [20, 50, 80])
    return {"median_ms": middle, "p20_ms": p20, "p80_ms": p80, "n": len(fitted), "status": OK}
