"""Limits on what a vector may cost: what the predictor rules out is never evaluated.

Every metric but the loss depends on counts alone, on how many layers have each number of groups. So there are few costs
to look at, however many vectors a space has, and whether limits can be met is known before anything is trained.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import UserError
from nas.metrics import Metrics
from nas.space import SearchSpace, Vector

_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Limit:
    """The largest or smallest value that a metric may have.

    Attributes:
        key: Its name in the config, such as ``max_decode_ms``.
        bound: Its value.
    """

    key: str
    bound: float

    @property
    def metric(self) -> str:
        """The metric that is limited."""
        return self.key.split("_", maxsplit=1)[1]

    def excess(self, costs: Metrics) -> float:
        """By how much a vector misses the limit; 0 or less if it keeps it, to the digits that are printed."""
        over = float(costs[self.metric]) - self.bound
        return (over if self.key.startswith("max_") else -over) - _TOLERANCE * abs(self.bound)


class Constraints:
    """Limits, and which vectors of a space keep all of them.

    Args:
        limits: Their bounds by name; None is no limit.
        space: The search space.
        costs_of: Predicted metrics of a vector; must depend on its counts alone.

    Raises:
        UserError: No vector keeps them all.
    """

    def __init__(
        self, limits: Mapping[str, float | None], space: SearchSpace, costs_of: Callable[[Vector], Metrics]
    ) -> None:
        self._limits = [Limit(key, bound) for key, bound in limits.items() if bound is not None]
        self._space, self._costs_of = space, costs_of
        self._kept: dict[Vector, bool] = {}
        if self._limits:
            self._check_reachable()

    def keep(self, vector: Vector) -> bool:
        """Whether a vector keeps all limits."""
        counts = tuple(sorted(vector))
        if counts not in self._kept:
            costs = self._costs_of(counts) if self._limits else {}
            self._kept[counts] = all(limit.excess(costs) <= 0 for limit in self._limits)
        return self._kept[counts]

    @cached_property
    def size(self) -> int:
        """How many vectors of the space keep all limits."""
        if not self._limits:
            return self._space.size
        return sum(ways for counts, ways in ways_by_counts(self._space).items() if self.keep(counts))

    def permits(self, vectors_NL: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Which of many vectors keep all limits."""
        return np.asarray(by_counts(self.keep, vectors_NL), dtype=bool)

    def vectors(self) -> Iterator[Vector]:
        """All vectors of the space that keep all limits, in lexicographic order."""
        return filter(self.keep, itertools.product(*self._space.choices))

    def _check_reachable(self) -> None:
        left = [self._costs_of(counts) for counts in ways_by_counts(self._space)]
        before: list[Limit] = []
        for limit in self._limits:
            closest = min(left, key=limit.excess)
            left = [costs for costs in left if limit.excess(costs) <= 0]
            if not left:
                given = " and ".join(f"{other.key} {other.bound:g}" for other in before)
                raise UserError(
                    f"constraints.{limit.key} is {limit.bound:g}, but the closest that a vector of {self._space.name} "
                    f"comes{given and ' with '}{given} is {closest[limit.metric]:.9g}; change it to that or beyond"
                )
            before.append(limit)


def by_counts(function: Callable[[Vector], Any], vectors_NL: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """A function of many vectors that depends on their counts alone, and is called once for each."""
    different, which = np.unique(np.sort(vectors_NL, axis=1), axis=0, return_inverse=True)
    return np.array([function(tuple(counts)) for counts in different.tolist()])[which.ravel()]


def ways_by_counts(space: SearchSpace) -> dict[Vector, int]:
    """How many vectors there are of each combination of counts, which is named by its groups in ascending order."""
    levels = sorted(set().union(*space.choices))
    ways: Counter[tuple[int, ...]] = Counter({(0,) * len(levels): 1})
    for allowed in space.choices:
        extended: Counter[tuple[int, ...]] = Counter()
        for counts, number in ways.items():
            for groups in allowed:
                at = levels.index(groups)
                extended[(*counts[:at], counts[at] + 1, *counts[at + 1 :])] += number
        ways = extended
    return {
        tuple(groups for groups, count in zip(levels, counts, strict=True) for _ in range(count)): number
        for counts, number in ways.items()
    }
