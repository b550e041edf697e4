"""A measured latency table: table.csv, a row (`COLUMNS`) per point, and latency.json, which says what the times mean.

Times are interpolated where physics makes them straight. A decode step's grow with the bytes that it moves: at one
batch linearly in the context, and from batch to batch likewise. A prefill chunk's grow with its operations: at one
prompt length linearly in its tokens, and at as many tokens linearly in the length.

They are of short runs. latency.json has how many times as long steps of uniform vectors took that followed one another
for seconds (``lasting_load``): `TableLatency.decode_ms` is of such steps, `TableLatency.forward_ms` of short runs.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import make_interp_spline

from nas.errors import UserError, in_short
from nas.files import file_hash, numbers, read_csv, read_json, require
from nas.latency.accuracy import CHECK, CHECK_COLUMNS, overall_errors
from nas.latency.energy import ENERGY, EnergyTable
from nas.latency.predictor import (
    EMBEDDING_AND_HEAD,
    NO_ENGINE,
    PHASES,
    POINT_COLUMNS,
    STEP_REVISION,
    Phase,
    Predictor,
    Workload,
)
from nas.shape import FEATURES, ModelShape
from nas.space import SearchSpace

TABLE, META = "table.csv", "latency.json"
COLUMNS = [*POINT_COLUMNS, "median_ms", "p20_ms", "p80_ms", "n", "status"]
OK, OUT_OF_MEMORY = "ok", "out_of_memory"
_SHAPE_KEYS = ("hidden_size", "num_attention_heads", "head_dim", "intermediate_size", "vocab_size")
_REPORTED_SLOWER = 0.005
_ENOUGH_MODELS, _LEAST_TAU = 8, 0.3  # a table that was held against so many must rank them at least so well


def layer_shape(shape: ModelShape) -> dict[str, Any]:
    """What a table depends on of a shape: not the number of layers, nor the rotary embeddings' values."""
    features = [key for key in FEATURES if key != "rope_scaling" and getattr(shape, key)]
    return {key: getattr(shape, key) for key in (*_SHAPE_KEYS, *features)}


class TableLatency(Predictor):
    """Predicts from the measured table in a folder."""

    source = "measured"
    folder: Path
    digest: str

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, (meta := {"step_revision": 1} | read_json(folder / META))
        try:
            self.is_current = meta["step_revision"] >= STEP_REVISION.get(meta["runtime"], 1)
            drift = meta.get("drift") or {"segments": 0, "segments_beyond": 0}
            self.is_steady = drift["segments_beyond"] <= drift["segments"] / 2  # else too many to be timed again
            self._measured = meta["device"]["slug"], meta["shape"], meta["dtype"], meta["runtime"]
            self._slowdowns = _slowdowns(meta)
            self.description = self._describe()
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else in_short(error)
            raise UserError(f"{folder / META} is corrupt ({reason}); restore it or measure again") from None
        self.idle_watts = meta.get("idle_watts")
        by_part = _read_times(folder / TABLE).groupby(["phase", "part", "groups"])
        self._surfaces = {key: _Surface(rows, prefill=key[0] == "prefill") for key, rows in by_part}
        self.digest = file_hash(folder / TABLE)
        self.energy = EnergyTable(folder / ENERGY) if (folder / ENERGY).is_file() else None

    def slowdown(self, groups: int, batch: int) -> float:
        return float(np.interp(batch, *self._slowdowns[groups])) if groups in self._slowdowns else 1.0

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        return self._at(phase, "layer", groups, batch, length)

    def embedding_and_head_ms(self, phase: Phase, batch: int, length: int) -> float:
        return sum(self._at(phase, part, 0, batch, length if phase == "prefill" else 1) for part in EMBEDDING_AND_HEAD)

    def check_ranking(self) -> None:
        """Refuses a table that does not put end-to-end models into the order of their measured decode times."""
        checks = [one for one in self.meta["check"] if one["phase"] == "decode" and one["n"] >= _ENOUGH_MODELS]
        taus = [one["kendall_tau"] for one in checks if "kendall_tau" in one]
        if taus and sum(taus) / len(taus) < _LEAST_TAU:
            raise UserError(
                f"{self.folder} ranks nothing: Kendall's tau of its decode times and those of {checks[0]['n']} models "
                f"is {sum(taus) / len(taus):.2f}; measure another one, or name it with latency="
            )

    def check(self) -> pd.DataFrame:
        """The end-to-end models that the table was checked against: `CHECK_COLUMNS`."""
        return read_csv(self.folder / CHECK, CHECK_COLUMNS, positive=CHECK_COLUMNS[2:])

    def is_of(self, device: str, space: SearchSpace, workload: Workload) -> bool:
        """Whether the table is of a device, shape, dtype and runtime; none is of a serving engine."""
        wanted = (device, layer_shape(space.shape), workload.dtype, workload.runtime)
        return self._measured == wanted and workload.engine == NO_ENGINE

    def fits(self, device: str, space: SearchSpace, workload: Workload, batches: Iterable[int]) -> bool:
        """Whether the table is of these, and covers batches of a workload."""
        if not self.is_of(device, space, workload):
            return False
        try:
            for batch, groups in itertools.product(batches, space.levels):
                self.decode_ms((groups,), batch, workload.context)
                self.prefill_ms((groups,), batch, workload.prompt)
        except UserError:
            return False
        return True

    def _describe(self) -> str:
        meta, slowdowns = self.meta, self._slowdowns
        words = [f"measured on {meta['device']['name']} on {meta['date'][:10]}"]
        if clock := meta.get("clock"):
            words.append(f"{clock}, good for ratios between vectors but not the latency of a loaded machine")
        for phase in PHASES:
            if checks := [summary for summary in meta["check"] if summary["phase"] == phase]:
                mean, worst = overall_errors(checks)
                where = ", ".join(f"{check['batch']} x {check['length']}" for check in checks)
                at = f"{max(check['n'] for check in checks)} end-to-end models at {where} tokens"
                what = "short runs of decode" if phase == "decode" and slowdowns else phase
                words.append(f"mean error of {what} {mean:.1%}, worst {worst:.1%} ({at})")
        slower = max((ratio for _, ratios in slowdowns.values() for ratio in ratios), default=1.0) - 1
        if slower >= _REPORTED_SLOWER:
            words.append(f"decode steps are those of a lasting load, which took up to {slower:.1%} longer")
        if not self.is_steady:
            segments = "{segments_beyond} of {segments} segments, by up to {worst:.0%}".format(**meta["drift"])
            words.append(f"the machine drifted in {segments}")
        if not self.is_current:
            words += ["decode steps were of an earlier version of this software, so may be off by a tenth at few rows"]
        return "; ".join(words)

    def _at(self, phase: str, part: str, groups: int, batch: int, length: int) -> float:
        where = self.folder / TABLE
        if not (surface := self._surfaces.get((phase, part, groups))):
            what = f"{groups} groups" if part == "layer" else part
            raise UserError(f"{where} has no {phase} times for {what}; measure this space")
        if ms := surface.ms(batch, length):
            return ms
        reach = f"{surface.range} in {phase}, not batch {batch} and length {length}"
        raise UserError(f"{where} covers {reach}; measure that workload")


def _read_times(path: Path) -> pd.DataFrame:
    """The points of a table that fitted into memory."""
    table = read_csv(path, COLUMNS)
    lost = table["status"] == OUT_OF_MEMORY
    sizes, ms = numbers(table, ["groups", "batch", "length"]), numbers(table, ["median_ms"])["median_ms"]
    good = ((sizes % 1 == 0) & (sizes >= [0, 1, 1])).all(axis=1) & (((ms > 0) & (ms < math.inf)) | lost)
    good &= ~table.duplicated(POINT_COLUMNS)
    require(path, table, good, "a number is not positive, or a point is there twice")
    return table[~lost]


def _slowdowns(meta: Mapping[str, Any]) -> dict[int, tuple[list[int], list[float]]]:
    """By groups, batches and how many times as long lasting steps took; of eager steps the host decides that."""
    found: dict[int, tuple[list[int], list[float]]] = {}
    loads = meta.get("lasting_load", []) if meta["runtime"] != "eager" else []
    for load in sorted(loads, key=lambda load: load["batch"]):
        if not 0 < load["ratio"] < math.inf:
            raise ValueError(f"a ratio of lasting_load is {load['ratio']}")
        batches, ratios = found.setdefault(load["groups"], ([], []))
        batches.append(load["batch"])
        ratios.append(load["ratio"])
    return found


class _Surface:
    """Times of one part, over an outer and an inner coordinate along which they are straight.

    Of decode those are batch and length; of prefill they are length and tokens, batch times length.
    """

    def __init__(self, rows: pd.DataFrame, prefill: bool) -> None:
        self._prefill = prefill
        outer, inner = ("length", "tokens") if prefill else ("batch", "length")
        rows = rows[["batch", "length", "median_ms"]].astype(float)
        rows = rows.assign(tokens=rows["batch"] * rows["length"]).sort_values([outer, inner])
        ranges = " and ".join(f"{axis} {rows[axis].min():g} to {rows[axis].max():g}" for axis in (outer, inner))
        self.range = f"{ranges} (less where memory ended)"
        self._lines: dict[Any, Any] = {}  # by outer coordinate: batches, inner coordinates and times
        for at, line in rows.groupby(outer):
            batches, x, y = line[["batch", inner, "median_ms"]].to_numpy().T
            if prefill and len(x) == 1:  # prompts so long that they go alone take the same time for each token
                x, y = np.insert(x, 0, 0), np.insert(y, 0, 0)
            self._lines[at] = batches, x, y

    def ms(self, batch: int, length: int) -> float | None:
        """The time at a batch and length; None where the measured points do not surround these."""
        outer, inner = (length, batch * length) if self._prefill else (batch, length)
        below, above = [at for at in self._lines if at <= outer], [at for at in self._lines if at >= outer]
        if not below or not above:
            return None
        nearest = sorted({below[-1], above[0]})
        lines = [self._lines[at] for at in nearest]
        for batches, x, _ in lines:
            covered = x[0] <= inner <= x[-1]
            if self._prefill:  # no fewer rows than were measured, and no more rows or no more tokens
                covered = batches[0] <= batch and (batch <= batches[-1] or inner <= x[-1])
            if not covered:
                return None
        ms = _along(nearest, [_along(x, y, inner) for _, x, y in lines], outer)
        return ms if ms > 0 else None  # a line of prompts goes on below its fewest tokens, and may end up there


def _along(x: Any, y: Any, at: float) -> float:
    """Linear interpolation, and outside with the outermost slope; constant if there is one point."""
    return float(y[0]) if len(x) == 1 else float(make_interp_spline(x, y, k=1)(at))


def summarise(times_ms: Sequence[float]) -> dict[str, Any]:
    """Median, percentiles and count of the times that are not infinite, which is to say that fitted into memory."""
    fitted = [ms for ms in times_ms if ms < math.inf]
    p20, middle, p80 = np.percentile(fitted, [20, 50, 80]) if fitted else [np.nan] * 3
    status = OK if fitted else OUT_OF_MEMORY
    return {"median_ms": middle, "p20_ms": p20, "p80_ms": p80, "n": len(fitted), "status": status}
