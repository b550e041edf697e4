"""Limits on what a vector may cost: what the predictor rules out is never evaluated.

Every metric but the loss depends only on the sorted vector: on how many layers have each number of groups. So there are
few costs to look at, however many vectors a space has, and whether limits can be met is known before any training.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import UserError
from nas.metrics import Metrics
from nas.space import SearchSpace, Vector

_TOLERANCE = 1e-8


class Constraints:
    """Limits, and which vectors of a space keep all of them.

    Args:
        limits: Their bounds by name; None is no limit.
        space: The search space.
        costs_of: Predicted metrics of a vector; must depend on the sorted vector alone.

    Raises:
        UserError: No vector keeps them all.
    """

    def __init__(
        self, limits: Mapping[str, float | None], space: SearchSpace, costs_of: Callable[[Vector], Metrics]
    ) -> None:
        self._limits = {key: bound for key, bound in limits.items() if bound is not None}
        self._space, self._costs_of = space, costs_of
        self._kept: dict[Vector, bool] = {}
        if self._limits:
            self._check_reachable()

    def keep(self, vector: Vector) -> bool:
        """Whether a vector keeps all limits."""
        ordered = tuple(sorted(vector))
        if ordered not in self._kept:
            costs = self._costs_of(ordered) if self._limits else {}
            self._kept[ordered] = all(self._excess(key, costs) <= 0 for key in self._limits)
        return self._kept[ordered]

    def _excess(self, key: str, costs: Metrics) -> float:
        """By how much a vector misses a limit; 0 or less if it keeps it, to the digits that are printed."""
        bound, (way, metric) = self._limits[key], key.split("_", maxsplit=1)
        over = float(costs[metric]) - bound
        return (over if way == "max" else -over) - _TOLERANCE * abs(bound)

    @cached_property
    def size(self) -> int:
        """How many vectors of the space keep all limits."""
        if not self._limits:
            return self._space.size
        return sum(ways for vector, ways in ways_by_counts(self._space).items() if self.keep(vector))

    def permits(self, vectors_NL: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Which of many vectors keep all limits."""
        return np.asarray(by_counts(self.keep, vectors_NL), dtype=bool)

    def vectors(self) -> Iterator[Vector]:
        """All vectors of the space that keep all limits, in lexicographic order."""
        return filter(self.keep, itertools.product(*self._space.choices))

    def _check_reachable(self) -> None:
        left, before = list(map(self._costs_of, ways_by_counts(self._space))), ""
        for key, bound in self._limits.items():
            closest = min(left, key=lambda costs: self._excess(key, costs))
            left = [costs for costs in left if self._excess(key, costs) <= 0]
            if not left:
                raise UserError(
                    f"constraints.{key} is {bound:g}, but the closest that a vector of {self._space.name} comes"
                    f"{before} is {closest[key.split('_', maxsplit=1)[1]]:.9g}; change it to that or beyond"
                )
            before += f" {'and' if before else 'with'} {key} {bound:g}"


def by_counts(function: Callable[[Vector], Any], vectors_NL: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """A function of many vectors that depends only on the sorted vector, and is called once for each of these."""
    different, which = np.unique(np.sort(vectors_NL, axis=1), axis=0, return_inverse=True)
    return np.array([function(tuple(counts)) for counts in different.tolist()])[which.ravel()]


def ways_by_counts(space: SearchSpace) -> dict[Vector, int]:
    """How many vectors there are of each sorted vector."""
    ways: dict[Vector, int] = {(): 1}
    for allowed in space.choices:
        extended: Counter[Vector] = Counter()
        for vector, number in ways.items():
            for groups in allowed:
                extended[tuple(sorted((*vector, groups)))] += number
        ways = dict(extended)
    return ways
