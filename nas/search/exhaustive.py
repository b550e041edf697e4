"""ExhaustiveSampler: every vector of a space in lexicographic order, for spaces small enough to evaluate as a whole."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class ExhaustiveSampler(BaseSampler):
    """Proposes the first vector in lexicographic order that is not taken.

    Args:
        seed: Changes nothing; every sampler is given one.

    Attributes:
        permitted: Which of some vectors of groups (N, L) may be proposed; None: all.
        taken: Vectors that must not be proposed, beside those of the study's trials.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.permitted: Callable[[npt.NDArray[np.intp]], npt.NDArray[np.bool_]] | None = None
        self.taken: set[tuple[int, ...]] = set()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters of the last finished trial."""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return dict(finished[-1].distributions) if finished else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next vector; the last one of all where none is left."""
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        taken = self.taken | {tuple(other.params.get(name) for name in search_space) for other in others}
        vector: tuple[Any, ...] = ()
        for vector in itertools.product(*map(_choices, search_space.values())):
            if vector not in taken and (self.permitted is None or self.permitted(np.array([vector]))[0]):
                break
        return dict(zip(search_space, vector, strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The first choice: only before any trial is finished."""
        return _choices(param_distribution)[0]


def _choices(distribution: BaseDistribution) -> tuple[Any, ...]:
    if not isinstance(distribution, CategoricalDistribution):
        raise ValueError(f"{distribution} has no list of choices; this sampler takes nothing else")
    return distribution.choices
