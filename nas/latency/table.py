"""A measured latency table: a CSV of times and a JSON that says what they mean.

table.csv has one row a point: ``phase, part, groups, batch, length, median_ms, p20_ms, p80_ms, n``. ``part`` is
``layer`` (one layer with ``groups`` KV groups) or ``ends`` (embedding, final norm and head; groups 0). latency.json
holds the device, shape, dtype, runtime, versions, date, and how far the predictor was from whole models.

Between grid points times are interpolated linearly in batch and in length: the bytes of the KV cache grow with their
product and everything else with the batch, so a layer's time is close to bilinear. Outside the grid nothing is said.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import RegularGridInterpolator

from nas.errors import UserError
from nas.files import file_hash, read_json
from nas.latency.model import PHASES, Phase, Workload
from nas.space import FEATURES, ModelShape, SearchSpace

TABLE, META, CHECK = "table.csv", "latency.json", "check.csv"
COLUMNS = ["phase", "part", "groups", "batch", "length", "median_ms", "p20_ms", "p80_ms", "n"]
CHECK_COLUMNS = ["phase", "vector", "batch", "length", "measured_ms", "predicted_ms"]
_META_KEYS = {"check", "date", "device", "dtype", "runtime", "shape", "workload"}
_SHAPE_KEYS = ("hidden_size", "num_attention_heads", "head_dim", "intermediate_size", "vocab_size")


def layer_shape(shape: ModelShape) -> dict[str, int]:
    """The part of a shape that a table depends on: not the number of layers, nor the rotary embeddings' values."""
    features = [key for key in FEATURES if key != "rope_scaling" and getattr(shape, key)]
    return {key: getattr(shape, key) for key in (*_SHAPE_KEYS, *features)}


class TableLatency:
    """Latency model from a measured table.

    Args:
        folder: Holds table.csv and latency.json.

    Raises:
        UserError: A file is missing or corrupt.
    """

    source = "measured"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = read_json(folder / META)
        if missing := sorted(_META_KEYS - self.meta.keys()):
            raise UserError(f"{folder / META} is corrupt (it lacks {', '.join(missing)}); restore it or measure again")
        table = read_csv(folder / TABLE, COLUMNS)
        bad = table.index[~(pd.to_numeric(table["median_ms"], errors="coerce") > 0)]
        if table.empty or len(bad):
            row = f"row {bad[0] + 2}" if len(bad) else "no row at all"
            raise UserError(f"{folder / TABLE} is corrupt ({row}: median_ms must be positive); measure again")
        self._grids = dict(self._interpolators(table))

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        return self._at(phase, "layer", groups, batch, length)

    def ends_ms(self, phase: Phase, batch: int, length: int) -> float:
        return self._at(phase, "ends", 0, batch, length)

    def describe(self) -> str:
        words = f"measured on {self.meta['device']['name']} on {self.meta['date'][:10]}"
        check, at = self.meta["check"], self.meta["workload"]
        if phases := [phase for phase in PHASES if phase in check]:
            errors = ", ".join(f"{phase} {check[phase]['mape']:.1%}" for phase in phases)
            words += f"; mean error {errors} over {check[phases[0]]['n']} whole models"
            words += f" at batch {at['batch']}, context {at['context']}, prompt {at['prompt']}"
        return words

    def digest(self) -> str:
        """Hash of the times."""
        return file_hash(self.folder / TABLE)

    def check(self) -> pd.DataFrame:
        """The whole models that the table was checked against: `CHECK_COLUMNS`.

        Raises:
            UserError: check.csv is missing or corrupt.
        """
        return read_csv(self.folder / CHECK, CHECK_COLUMNS)

    def fits(self, device: str, space: SearchSpace, workload: Workload) -> bool:
        """Whether the table covers a device, the groups of a space and a workload."""
        same = (self.meta["device"]["slug"], self.meta["shape"], self.meta["dtype"], self.meta["runtime"])
        if same != (device, layer_shape(space.shape), workload.dtype, workload.runtime):
            return False
        try:
            for groups in set().union(*space.choices):
                self.layer_ms("decode", groups, workload.batch, workload.context)
                self.layer_ms("prefill", groups, workload.batch, workload.prompt)
        except UserError:
            return False
        return True

    def _at(self, phase: str, part: str, groups: int, batch: int, length: int) -> float:
        if (phase, part, groups) not in self._grids:
            raise UserError(f"{self.folder / TABLE} has no {phase} times for {groups} groups; measure this space")
        grid = self._grids[phase, part, groups]
        try:
            return float(grid((batch, length)).item())
        except ValueError:
            ranges = [f"{axis.min():g} to {axis.max():g}" for axis in grid.grid]
            raise UserError(
                f"{self.folder / TABLE} covers batch {ranges[0]} and length {ranges[1]} in {phase}, not {batch} and "
                f"{length}; measure that workload"
            ) from None

    def _interpolators(self, table: pd.DataFrame) -> Iterator[tuple[tuple[str, str, int], RegularGridInterpolator]]:
        for key, rows in table.groupby(["phase", "part", "groups"]):
            times = rows.pivot(index="batch", columns="length", values="median_ms").sort_index().sort_index(axis=1)
            if times.isna().to_numpy().any() or min(times.shape) < 2:
                raise UserError(
                    f"{self.folder / TABLE} has gaps at {key}: it needs every batch at every length, two of each"
                )
            axes = (times.index.to_numpy(float), times.columns.to_numpy(float))
            yield key, RegularGridInterpolator(axes, times.to_numpy(float))  # type: ignore[misc]


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """Reads a CSV that must have at least ``columns``.

    Raises:
        UserError: It is missing, no CSV, or lacks a column.
    """
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it") from None
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} is not a valid CSV ({' '.join(str(error).split())}); restore it") from None
    if missing := [column for column in columns if column not in frame.columns]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; restore it or run its stage again")
    return frame


def summarise(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds, and how many."""
    p20, median, p80 = np.percentile(np.array(seconds) * 1e3, [20, 50, 80])
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "n": len(seconds)}
