"""What a search is about: which vectors there are, what is wanted of them, and what is known of them beforehand."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nas.errors import UserError
from nas.metrics import Metrics
from nas.search.constraints import Constraints, by_counts
from nas.search.pareto import Objectives
from nas.space import SearchSpace, Vector, format_vector

LOSS = "loss_nats"


@dataclass(frozen=True)
class Problem:
    """A search's problem. Only the loss of a vector takes an evaluation.

    Attributes:
        space: The search space.
        objectives: What to optimise.
        loss: Loss of a vector in nats per token.
        costs: Maps a vector to all its other metrics; depends on the sorted vector alone.
        constraints: Limits on the costs.
    """

    space: SearchSpace
    objectives: Objectives
    loss: Callable[[Vector], float]
    costs: Callable[[Vector], Metrics]
    constraints: Constraints

    def evaluate(self, vector: Vector) -> Metrics:
        """All metrics of a vector.

        Raises:
            UserError: Its loss is no number.
        """
        loss = self.loss(vector)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of {format_vector(vector)} is {loss}: the supernet has diverged; train another one with a "
                "lower train.learning_rate"
            )
        return {**self.costs(vector), LOSS: loss}

    def known_objectives(self, vectors_NL: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """The objectives of vectors as far as they are costs, (N, O); NaN for the loss."""
        return by_counts(self._known, vectors_NL)

    @cached_property
    def _known(self) -> Callable[[Vector], list[float]]:
        def known(vector: Vector) -> list[float]:
            costs = {**self.costs(vector), LOSS: math.nan}
            return [float(costs[name]) for name in self.objectives.names]

        return functools.cache(known)
