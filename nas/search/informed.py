"""Samplers that can be told what is known of a search without evaluating anything."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Costs = Callable[[Ints], Floats]
"""Objectives (N, O) of vectors of groups (N, L), as far as they are known without evaluation; NaN where not. They
depend on counts alone: on how many layers have each number of groups."""
Permitted = Callable[[Ints], npt.NDArray[np.bool_]]
"""Which of some vectors of groups (N, L) may be proposed; depends on counts alone."""


class InformedSampler(BaseSampler):
    """A sampler of whole vectors that makes use of more than a study's trials, where it is told.

    Attributes:
        costs: The objectives that are known beforehand; None: none.
        permitted: What may be proposed; None: everything.
        taken: Vectors that must not be proposed, beside those of the study's trials.
    """

    def __init__(self) -> None:
        self.costs: Costs | None = None
        self.permitted: Permitted | None = None
        self.taken: set[tuple[int, ...]] = set()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters of the last finished trial."""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return dict(finished[-1].distributions) if finished else {}
