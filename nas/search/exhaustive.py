"""ExhaustiveSampler: every vector of a space in lexicographic order, for spaces small enough to evaluate as a whole."""

import itertools
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from nas.search.informed import InformedSampler, Layers


class ExhaustiveSampler(InformedSampler):
    """Proposes the first vector in lexicographic order that is permitted and not taken.

    Args:
        seed: Changes nothing; every sampler is given one.
    """

    def __init__(self, seed: int | None = None) -> None:
        pass

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next vector; the last one of all where none is left."""
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        taken = self.taken | {tuple(other.params.get(name) for name in search_space) for other in others}
        layers = Layers.of(search_space.values())
        vector: tuple[int, ...] = ()
        for vector in itertools.product(*(layers.levels_K[allowed].tolist() for allowed in layers.allowed_LK)):
            if vector not in taken and (self.permitted is None or self.permitted(np.array([vector]))[0]):
                break
        return dict(zip(search_space, vector, strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The first choice: only before any trial is finished."""
        return Layers.of([param_distribution]).levels_K[0].item()
