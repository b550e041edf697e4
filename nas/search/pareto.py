"""Fronts and hypervolume, by moocore, over data frames whose columns are metrics."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd

from nas.errors import UserError
from nas.metrics import METRICS, OBJECTIVES

_REFERENCE_MARGIN = 0.1  # of the reference_vectors' range
_BYTES = "kv_bytes_per_token"


@dataclass(frozen=True)
class Objectives:
    """Two or three metrics to optimise together.

    Raises:
        UserError: An unknown or repeated metric, or another number of them.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in OBJECTIVES:
                raise UserError(f"objective '{name}' is none; use two or three of {', '.join(OBJECTIVES)}")
        if not 2 <= len(set(self.names)) == len(self.names) <= 3:
            raise UserError(f"objectives is [{', '.join(self.names)}]; give two or three different metrics")

    @property
    def maximise(self) -> list[bool]:
        """Whether each objective is better when larger."""
        return [METRICS[name].maximise for name in self.names]

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Optuna's names of the directions."""
        return ["maximize" if up else "minimize" for up in self.maximise]

    def points(self, frame: pd.DataFrame) -> npt.NDArray[np.float64]:
        """The objective values of each row, shape (rows, objectives)."""
        return frame[list(self.names)].to_numpy(dtype=float)


def on_front(frame: pd.DataFrame, objectives: Objectives) -> npt.NDArray[np.bool_]:
    """Which rows no other row dominates; of rows that are equal in all objectives the first counts."""
    return np.asarray(moocore.is_nondominated(objectives.points(frame), maximise=objectives.maximise), dtype=bool)


def reference_point(reference_vectors: pd.DataFrame, objectives: Objectives) -> npt.NDArray[np.float64]:
    """The hypervolume's reference point: a tenth of the reference vectors' range beyond the worst of them.

    Every search evaluates the same reference vectors first, so searches of one space and workload share this point,
    unless their limits or a small budget leave some out: then give all that was evaluated. A margin in proportion to
    the value instead of the range would drown the front: losses differ in the third digit.
    """
    points = objectives.points(reference_vectors)
    worst = np.where(objectives.maximise, points.min(0), points.max(0))
    spread = np.ptp(points, axis=0)
    margin = _REFERENCE_MARGIN * np.where(spread > 0, spread, np.abs(worst))
    return np.asarray(worst + np.where(objectives.maximise, -margin, margin))


def hypervolume_curve(
    trials: pd.DataFrame, objectives: Objectives, reference: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Hypervolume after each evaluation, in the order of ``trials``; the product of the objectives' units."""
    points = objectives.points(trials)
    return np.array(
        [
            moocore.hypervolume(points[: count + 1], ref=reference, maximise=objectives.maximise)
            for count in range(len(points))
        ]
    )


def front_distance(points: npt.NDArray[np.float64], best: npt.NDArray[np.float64], objectives: Objectives) -> float:
    """How far some points stay behind a reference front: moocore's IGD+, each objective scaled to that front's range.

    Args:
        points: Objective values, (N, objectives).
        best: Those of the reference front.
        objectives: What they are.

    Returns:
        0 if the points are as good everywhere.
    """
    low, spread = best.min(axis=0), np.ptp(best, axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    return float(moocore.igd_plus((points - low) / scale, (best - low) / scale, maximise=objectives.maximise))


def gains_over_uniform(trials: pd.DataFrame, uniform: Collection[str]) -> pd.DataFrame:
    """What the best vectors gain over each uniform one.

    Args:
        trials: Evaluated vectors.
        uniform: The uniform vectors, as texts.

    Returns:
        One row for each evaluated uniform vector: ``vector``; ``loss_gain_nats``, by how much the best loss at no more
        KV bytes is lower; ``bytes_saved``, which part of its KV bytes is not needed for a loss as low.
    """
    rows = []
    for vector, loss, size in trials.loc[trials["vector"].isin(uniform), ["vector", "loss_nats", _BYTES]].to_numpy():
        at_its_bytes = trials.loc[trials[_BYTES] <= size, "loss_nats"].min()
        at_its_loss = trials.loc[trials["loss_nats"] <= loss, _BYTES].min()
        rows.append((vector, float(loss - at_its_bytes), 1.0 - float(at_its_loss) / size))
    return pd.DataFrame(rows, columns=["vector", "loss_gain_nats", "bytes_saved"])


def knee(front: pd.DataFrame, objectives: Objectives) -> int:
    """Position of the knee: the front point nearest to the ideal, each objective scaled to the front's range."""
    points = objectives.points(front) * np.where(objectives.maximise, -1.0, 1.0)
    spread = np.ptp(points, axis=0)
    scaled = (points - points.min(0)) / np.where(spread > 0, spread, 1.0)
    return int(np.linalg.norm(scaled, axis=1).argmin())
