"""A measured latency table: a CSV of times and a JSON that says what they mean.

table.csv has one row per point: ``phase, part, groups, batch, length, median_ms, p20_ms, p80_ms, n, status``. ``part``
is ``layer`` (one layer with ``groups`` KV groups), ``embedding`` or ``head`` (groups 0); status is ``ok``, or
``out_of_memory`` for a point that did not fit and has no times. latency.json holds the device, shape, dtype, runtime,
versions, date, what the sentinel saw, and how far the predictor was from end-to-end models.

Between points, times are interpolated where physics makes them straight. A decode step's time grows with the bytes that
it moves: at one batch linearly in the context, and from batch to batch likewise. A prefill chunk's time grows with its
operations: at one prompt length linearly in its tokens, and at as many tokens linearly in the length. Outside the
measured range there is no prediction, unless that is asked for; then the outermost slopes are prolonged.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.interpolate import make_interp_spline

from nas.csv_files import counts, positive_numbers, read_csv, require
from nas.errors import UserError
from nas.files import file_hash, read_json
from nas.latency.accuracy import CHECK, CHECK_COLUMNS, phase_errors
from nas.latency.energy import ENERGY, EnergyTable
from nas.latency.points import EMBEDDING_AND_HEAD
from nas.latency.predictor import PHASES, STEP_REVISION, Phase, Predictor, Workload
from nas.serving.batching import prefill_chunks
from nas.shape import FEATURES, ModelShape
from nas.space import SearchSpace

TABLE, META = "table.csv", "latency.json"
COLUMNS = ["phase", "part", "groups", "batch", "length", "median_ms", "p20_ms", "p80_ms", "n", "status"]
OK, OUT_OF_MEMORY = "ok", "out_of_memory"
_NUMBER = int | float
_META: dict[str, Any] = {  # what latency.json must hold: types, dicts of them, lists of such
    "check": [{"phase": str, "batch": int, "length": int, "n": int, "mape": _NUMBER, "worst": _NUMBER}],
    "date": str,
    "device": {"name": str, "slug": str},
    "drift": {"segments": int, "segments_beyond": int, "worst": _NUMBER},
    "dtype": str,
    "lasting_load": [{"ratio": _NUMBER}],
    "runtime": str,
    "shape": dict,
    "step_revision": int,
    "workload": dict,
}
_DEFAULTS: dict[str, Any] = {
    "drift": {"segments": 0, "segments_beyond": 0, "worst": 0.0},
    "lasting_load": [],
    "step_revision": 1,
}
_SHAPE_KEYS = ("hidden_size", "num_attention_heads", "head_dim", "intermediate_size", "vocab_size")
_REPORTED_SLOWER = 0.005


def layer_shape(shape: ModelShape) -> dict[str, Any]:
    """What a table depends on of a shape: not the number of layers, nor the rotary embeddings' values."""
    features = [key for key in FEATURES if key != "rope_scaling" and getattr(shape, key)]
    return {key: getattr(shape, key) for key in (*_SHAPE_KEYS, *features)}


def _matches(value: Any, schema: Any) -> bool:
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(_matches(value.get(key), inner) for key, inner in schema.items())
    if isinstance(schema, list):
        return isinstance(value, list) and all(_matches(item, schema[0]) for item in value)
    return isinstance(value, schema)


class TableLatency(Predictor):
    """Predicts from the measured table in a folder; with ``extrapolate`` outside its range too, as an estimate."""

    folder: Path
    digest: str

    def __init__(self, folder: Path, extrapolate: bool = False) -> None:
        self.folder, self._extrapolate = folder, extrapolate
        self.source = "estimated" if extrapolate else "measured"
        self.meta = _DEFAULTS | read_json(folder / META)
        if wrong := [key for key, schema in _META.items() if not _matches(self.meta.get(key), schema)]:
            raise UserError(f"{folder / META} is corrupt ({wrong[0]} is missing or wrong); restore it or measure again")
        self.idle_watts = self.meta.get("idle_watts")
        table = read_csv(folder / TABLE, COLUMNS)
        self.digest = file_hash(folder / TABLE)
        known = table["phase"].isin(PHASES) & table["part"].isin(["layer", *EMBEDDING_AND_HEAD])
        known &= counts(table, ["groups", "batch", "length"]) & table["status"].isin([OK, OUT_OF_MEMORY])
        fitted = table["status"] == OK
        good = known & positive_numbers(table, ["batch", "length"]) & (positive_numbers(table, ["median_ms"]) | ~fitted)
        require(folder / TABLE, table, good, "a key is unknown, or a number not positive")
        if not fitted.any():
            raise UserError(f"{folder / TABLE} is corrupt (no row that fitted into memory); measure again")
        self._surfaces = {
            key: _Surface(rows, str(rows["phase"].iloc[0]), f"{folder / TABLE}")
            for key, rows in table[fitted].groupby(["phase", "part", "groups"])
        }
        self._energy = EnergyTable(folder / ENERGY) if (folder / ENERGY).is_file() else None

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        return self._at(phase, "layer", groups, batch, length)

    def embedding_and_head_ms(self, phase: Phase, batch: int, length: int) -> float:
        return sum(self._at(phase, part, 0, batch, length if phase == "prefill" else 1) for part in EMBEDDING_AND_HEAD)

    def describe(self) -> str:
        meta, checks = self.meta, self.meta["check"]
        words = [f"measured on {meta['device']['name']} on {meta['date'][:10]}"]
        if clock := meta.get("clock"):
            words.append(f"{clock}, good for ratios between vectors but not the latency of a loaded machine")
        if checks:
            errors = {phase: error for phase in PHASES if (error := phase_errors(checks, phase))}
            by_phase = ", ".join(f"{phase} {mean:.1%} (worst {worst:.1%})" for phase, (mean, worst) in errors.items())
            where = "; ".join(
                f"{phase} at " + ", ".join(f"{s['batch']} x {s['length']}" for s in checks if s["phase"] == phase)
                for phase in errors
            )
            models = max(summary["n"] for summary in checks)
            words.append(f"mean error {by_phase} over {models} end-to-end models ({where} tokens)")
        slower = max((load["ratio"] for load in meta["lasting_load"]), default=1.0) - 1
        if slower >= _REPORTED_SLOWER and meta["runtime"] != "eager":  # whose steps depend on the host
            words.append(f"steps that follow one another for seconds took up to {slower:.1%} longer")
        drift = meta["drift"]
        if (beyond := drift["segments_beyond"]) > drift["segments"] / 2:  # too many to be timed again
            words.append(
                f"the machine drifted in {beyond} of {drift['segments']} segments, by up to {drift['worst']:.0%}"
            )
        if not self.is_current:
            words.append(
                "decode steps were of an earlier version of this software, so may be off by a tenth at few rows"
            )
        if self._extrapolate:
            words.append("extrapolated beyond the measured range")
        return "; ".join(words)

    @property
    def is_current(self) -> bool:
        """Whether its decode steps were what they are now."""
        return bool(self.meta["step_revision"] >= STEP_REVISION.get(self.meta["runtime"], 1))

    def check(self) -> pd.DataFrame:
        """The end-to-end models that the table was checked against: `CHECK_COLUMNS`."""
        check = read_csv(self.folder / CHECK, CHECK_COLUMNS)
        require(self.folder / CHECK, check, positive_numbers(check, CHECK_COLUMNS[2:]), "its numbers must be positive")
        return check

    def energy(self, groups: Iterable[int]) -> EnergyTable | None:
        return self._energy if self._energy and self._energy.knows(groups) else None

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
        where = self.folder / TABLE
        if (phase, part, groups) not in self._surfaces:
            what = f"{groups} groups" if part == "layer" else part
            raise UserError(f"{where} has no {phase} times for {what}; measure this space")
        surface = self._surfaces[phase, part, groups]
        within = surface.covers(batch, length)
        if not self._extrapolate and not within:
            raise UserError(
                f"{where} covers {surface.range()} in {phase}, not batch {batch} and length {length}; measure that "
                "workload, or allow extrapolate=true"
            )
        ms = surface.ms(batch, length, within)
        if ms <= 0:
            raise UserError(
                f"{where} covers {surface.range()} in {phase}: too little to be extrapolated to batch {batch} and "
                f"length {length}; measure that workload"
            )
        return ms


class _Surface:
    """Times of one part, over an outer and an inner coordinate along which they are straight.

    Of decode those are batch and length; of prefill they are length and tokens, batch times length.
    """

    def __init__(self, rows: pd.DataFrame, phase: str, where: str) -> None:
        self._prefill = phase == "prefill"
        self._axes = outer, inner = ("length", "tokens") if self._prefill else ("batch", "length")
        rows = rows[["batch", "length", "median_ms"]].astype(float)
        self._rows = rows = rows.assign(tokens=rows["batch"] * rows["length"]).sort_values([outer, inner])
        if rows.duplicated([outer, inner]).any():
            raise UserError(f"{where} is corrupt ({phase} has a point twice); restore it or measure again")
        self._outer = rows[outer].unique()
        self._lines = {value: rows[rows[outer] == value][[inner, "median_ms"]].to_numpy().T for value in self._outer}
        if self._prefill:  # prompts so long that they go alone take the same time for each token
            self._lines |= {at: np.insert(line, 0, 0, axis=1) for at, line in self._lines.items() if line.shape[1] == 1}
        # Outside the measured range a line of one point, left where memory ended, has no slope to prolong.
        self._sloped: Any = [value for value, line in self._lines.items() if line.shape[1] > 1] or self._outer
        extent = rows.groupby(outer).agg({inner: ["min", "max"], "batch": ["min", "max"]})
        self._inner, self._batch = extent[inner].to_numpy(), extent["batch"].to_numpy()

    def ms(self, batch: int, length: int, within: bool) -> float:
        """The time at a batch and length, which the measured points surround or not."""
        outer, inner = self._coordinates(batch, length)
        values = self._outer if within else self._sloped
        return _along(values, [_along(x, y, inner) for x, y in map(self._lines.__getitem__, values)], outer)

    def covers(self, batch: int, length: int) -> bool:
        """Whether the measured points surround these."""
        outer, inner = self._coordinates(batch, length)
        if not self._outer[0] <= outer <= self._outer[-1]:
            return False
        nearest = slice(np.searchsorted(self._outer, outer, "right") - 1, np.searchsorted(self._outer, outer) + 1)
        (least, most), (fewest, largest) = self._inner[nearest].T, self._batch[nearest].T
        if self._prefill:  # no fewer rows than were measured, and no more rows or no more tokens
            return bool((fewest <= batch).all() and ((batch <= largest) | (inner <= most)).all())
        return bool(((least <= inner) & (inner <= most)).all())

    def range(self) -> str:
        """The measured range in words."""
        (outer, inner), low, high = self._axes, self._rows.min(), self._rows.max()
        ranges = [f"{axis} {low[axis]:g} to {high[axis]:g}" for axis in (outer, inner)]
        return f"{' and '.join(ranges)} (less where memory ended)"

    def _coordinates(self, batch: int, length: int) -> tuple[float, float]:
        return (float(length), float(batch * length)) if self._prefill else (float(batch), float(length))


def _along(x: Any, y: Any, at: float) -> float:
    """Linear interpolation, and outside with the outermost slope; constant if there is one point."""
    return float(y[0]) if len(x) == 1 else float(make_interp_spline(x, y, k=1)(at))


def summarise(times_ms: Sequence[float]) -> dict[str, Any]:
    """Median, percentiles and count of the times that are not infinite, which is to say that fitted into memory."""
    fitted = [ms for ms in times_ms if ms < math.inf]
    if not fitted:
        return {"median_ms": np.nan, "p20_ms": np.nan, "p80_ms": np.nan, "n": 0, "status": OUT_OF_MEMORY}
    p20, middle, p80 = np.percentile(fitted, [20, 50, 80])
    return {"median_ms": middle, "p20_ms": p20, "p80_ms": p80, "n": len(fitted), "status": OK}
