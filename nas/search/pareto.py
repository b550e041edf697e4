"""Fronts and hypervolume, by moocore, over data frames whose columns are metrics."""

from dataclasses import dataclass

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd

from nas.errors import UserError
from nas.metrics import METRICS, OBJECTIVES
from nas.search.exact import Floats

_REFERENCE_MARGIN = 0.1  # of the reference vectors' range


@dataclass(frozen=True)
class Objectives:
    """Two or three different metrics to optimise together."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        different = set(self.names).intersection(OBJECTIVES)
        if not 2 <= len(different) == len(self.names) <= 3:
            names, known = ", ".join(self.names), ", ".join(OBJECTIVES)
            raise UserError(f"objectives is [{names}]; give two or three different ones of {known}")

    @property
    def maximise(self) -> list[bool]:
        """Whether each objective is better when larger."""
        return [METRICS[name].maximise for name in self.names]

    def points(self, frame: pd.DataFrame) -> Floats:
        """The objective values of each row, shape (rows, objectives)."""
        return frame[list(self.names)].to_numpy(dtype=float)


def on_front(frame: pd.DataFrame, objectives: Objectives) -> npt.NDArray[np.bool_]:
    """Which rows no other row dominates; of rows that are equal in all objectives the first counts."""
    return np.asarray(moocore.is_nondominated(objectives.points(frame), maximise=objectives.maximise), dtype=bool)


def reference_point(reference_vectors: pd.DataFrame, objectives: Objectives) -> Floats:
    """The hypervolume's reference point: a tenth of the reference vectors' range beyond the worst of them.

    Searches of one space and workload share this point, as all evaluate the reference vectors first; where limits or a
    small budget leave some out, give all that was evaluated. A margin in proportion to the value instead of the range
    would drown the front: losses differ in the third digit.
    """
    points = objectives.points(reference_vectors)
    worst = np.where(objectives.maximise, points.min(0), points.max(0))
    spread = np.ptp(points, axis=0)
    margin = _REFERENCE_MARGIN * np.where(spread > 0, spread, np.abs(worst))
    return np.asarray(worst + np.where(objectives.maximise, -margin, margin))


def hypervolume_curve(trials: pd.DataFrame, objectives: Objectives, reference: Floats) -> Floats:
    """Hypervolume after each evaluation, in the order of ``trials``; the product of the objectives' units."""
    volume = moocore.Hypervolume(ref=reference, maximise=objectives.maximise)
    points = objectives.points(trials)
    return np.array([volume(points[: count + 1]) for count in range(len(points))])


def front_distance(points: Floats, best: Floats, objectives: Objectives) -> float:
    """How far points stay behind those of a reference front: IGD+, each objective scaled to that front's range."""
    low, high = best.min(axis=0), best.max(axis=0)
    scaled = (moocore.normalise(some, lower=low, upper=high, maximise=objectives.maximise) for some in (points, best))
    return float(moocore.igd_plus(*scaled))


def knee(front: pd.DataFrame, objectives: Objectives) -> int:
    """Position of the knee: the front point nearest to the ideal, each objective scaled to the front's range."""
    scaled = moocore.normalise(objectives.points(front), maximise=objectives.maximise)
    return int(np.linalg.norm(scaled, axis=1).argmin())
