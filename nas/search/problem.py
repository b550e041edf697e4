"""What a search is about: which vectors there are, what is wanted of them, and what is known without evaluating any.

Every metric but the loss depends only on the sorted vector: on how many layers have each number of groups. So there are
few costs to look at, however many vectors a space has, and whether limits can be met is known before any training.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nas.errors import UserError
from nas.metrics import LIMITS, LOSS, Metrics
from nas.search.exact import Floats, Ints
from nas.search.pareto import Objectives
from nas.space import SearchSpace, Vector

_TOLERANCE = 1e-8  # of a limit, which is given with no more digits than are printed


@dataclass
class Problem:
    """The vectors of a space that keep all limits, and the objectives in which the best of them are wanted."""

    space: SearchSpace
    objectives: Objectives
    costs: Callable[[Vector], Metrics]  # all metrics of a vector but its loss; must depend on the sorted vector alone
    limits: Mapping[str, float | None]  # bounds on costs by their keys in `nas.metrics.LIMITS`; None is no limit

    def __post_init__(self) -> None:
        """Raises a `UserError` if no vector keeps all limits."""
        self._limits = {key: bound for key, bound in self.limits.items() if bound is not None}
        self.size = self._count_within_limits() if self._limits else self.space.size  # vectors that keep all limits

    def keeps_limits(self, vector: Vector) -> bool:
        """Whether a vector may be evaluated."""
        return all(self._excess(key, self.costs(vector)) <= 0 for key in self._limits)

    def permits(self, vectors_NL: Ints) -> npt.NDArray[np.bool_]:
        """Which of many vectors keep all limits."""
        return np.asarray(_by_counts(self.keeps_limits, vectors_NL), dtype=bool)

    def vectors(self) -> Iterator[Vector]:
        """All vectors that keep all limits, in lexicographic order."""
        return filter(self.keeps_limits, itertools.product(*self.space.choices))

    def known_objectives(self, vectors_NL: Ints) -> Floats:
        """The objectives of many vectors as far as they are costs, (N, O); NaN for the loss."""

        def known(vector: Vector) -> list[float]:
            costs = {**self.costs(vector), LOSS: math.nan}
            return [float(costs[name]) for name in self.objectives.names]

        return _by_counts(known, vectors_NL)

    def _excess(self, key: str, costs: Metrics) -> float:
        """By how much a limit is missed; 0 or less if it is kept."""
        bound, metric = self._limits[key], LIMITS[key]
        over = float(costs[metric.name]) - bound
        return (-over if metric.maximise else over) - _TOLERANCE * abs(bound)

    def _count_within_limits(self) -> int:
        left, before = [(self.costs(vector), ways) for vector, ways in ways_by_counts(self.space).items()], ""
        for key, bound in self._limits.items():
            closest, _ = min(left, key=lambda one: self._excess(key, one[0]))
            left = [(costs, ways) for costs, ways in left if self._excess(key, costs) <= 0]
            if not left:
                raise UserError(
                    f"constraints.{key} is {bound:g}, but the closest that a vector of {self.space.name} comes{before} "
                    f"is {closest[LIMITS[key].name]:.9g}; change it to that or beyond"
                )
            before += f" {'and' if before else 'with'} {key} {bound:g}"
        return sum(ways for _, ways in left)


def _by_counts(function: Callable[[Vector], Any], vectors_NL: Ints) -> npt.NDArray[Any]:
    """A function of many vectors that depends only on the sorted vector, and is called once for each of these."""
    rows_NL = np.ascontiguousarray(np.sort(vectors_NL, axis=1))
    keys_N = rows_NL.view(f"V{rows_NL.itemsize * rows_NL.shape[1]}").ravel()  # far faster to sort than rows
    _, first, which_N = np.unique(keys_N, return_index=True, return_inverse=True)
    return np.array([function(tuple(row)) for row in rows_NL[first].tolist()])[which_N]


def ways_by_counts(space: SearchSpace) -> Counter[Vector]:
    """How many vectors there are of each sorted vector."""
    ways = Counter[Vector]({(): 1})
    for allowed in space.choices:
        extended = Counter[Vector]()
        for (vector, number), groups in itertools.product(ways.items(), allowed):
            extended[tuple(sorted((*vector, groups)))] += number
        ways = extended
    return ways


class Budget(NamedTuple):
    """How long a search may go on: so many evaluations or seconds; without either, until all vectors are evaluated.

    ``auto``: no longer than the sampler expects to find much.
    """

    evaluations: int | None = None
    seconds: float | None = None
    auto: bool = False


EVERYTHING, AUTO = Budget(), Budget(auto=True)


def parse_budget(text: str) -> Budget:
    """``200`` is evaluations; ``90s``, ``30m`` and ``2h`` are durations; ``all`` is every vector; or ``auto``."""
    if text in ("all", "auto"):
        return EVERYTHING if text == "all" else AUTO
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])|(\d+)", text.strip())
    if match and float(match[1] or match[3]) > 0:
        seconds_per = {"s": 1, "m": 60, "h": 3600}
        return Budget(int(match[3])) if match[3] else Budget(seconds=float(match[1]) * seconds_per[match[2]])
    fix = "give a number of evaluations (200) or a duration (90s, 30m, 2h) above zero, all or auto"
    raise UserError(f"budget is '{text}'; {fix}")
