"""A wrapper that makes any Optuna sampler propose only vectors that nobody has claimed yet, and resume exactly.

What a sampler proposes against this, or against the limits, becomes the nearest vector that may be proposed.

Every proposal is seeded by the study's seed and the slot that it is for, never by how often this process asked before:
a search that was killed and resumed proposes what the uninterrupted one would have, and workers on one study draw
differently.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from nas.search.exact import best_vectors
from nas.search.informed import Costs, InformedSampler, Permitted
from nas.search.layers import Layers
from nas.space import SearchSpace, Vector

_ATTEMPTS = 20
_MOST_NOISE = 1e6


def parameter_names(space: SearchSpace) -> list[str]:
    """Optuna's parameter names, one a layer: ``layer_00``, ``layer_01``, …"""
    return [f"layer_{index:02d}" for index in range(len(space.choices))]


def vector_of(trial: FrozenTrial, space: SearchSpace) -> Vector:
    """The vector of a trial whose parameters are all set."""
    return tuple(trial.params[name] for name in parameter_names(space))


class DistinctSampler(BaseSampler):
    """Proposes what an inner sampler proposes, unless the study has it already.

    Args:
        make: Makes the inner sampler from a ``seed``.
        space: The search space.
        seed: The study's seed.
        first: The vectors of the first slots, in order; the inner sampler proposes what comes after them.
        claimed: Returns the vectors that any worker has claimed.
        permitted: Which vectors may be proposed; None: all.
        costs: The objectives that are known beforehand; None: none.
    """

    def __init__(
        self,
        make: Callable[..., BaseSampler],
        space: SearchSpace,
        seed: int,
        first: Sequence[Vector] = (),
        claimed: Callable[[], set[Vector]] = set,
        permitted: Permitted | None = None,
        costs: Costs | None = None,
    ) -> None:
        self._make, self._space, self._seed, self._first, self._claimed = make, space, seed, first, claimed
        self._permitted, self._costs = permitted, costs
        self._slot, self._settled = 0, first[0] if first else None
        names = parameter_names(space)
        self.distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(choices) for name, choices in zip(names, space.choices, strict=True)
        }
        self._inner = make(seed=seed)

    def turn_to(self, slot: int, vector: Vector | None = None) -> None:
        """Makes the next proposal that of ``slot``; it is ``vector`` if that was settled before."""
        self._slot = slot
        self._settled = vector or (self._first[slot] if slot < len(self._first) else None)

    def give_way(self) -> None:
        """Leaves the slot's settled vector to another worker, who has it already."""
        self._settled = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All layers: a proposal is always a whole vector."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The settled vector of the slot, or one that is neither claimed nor in a finished trial."""
        if self._settled is not None:
            if not isinstance(self._inner, InformedSampler):  # which makes no notes, as NSGA-II does on generations
                self._ask_inner(study, trial, attempt=0)
            return dict(zip(search_space, self._settled, strict=True))
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        taken = {vector_of(other, self._space) for other in finished} | self._claimed() | set(self._first)
        for attempt in range(_ATTEMPTS):
            vector = self._propose(study, trial, attempt, taken)
            if vector not in taken:
                break
        if vector in taken or not (self._permitted is None or self._permitted(np.array([vector]))[0]):
            vector = self._nearest(vector, taken, np.random.default_rng([self._seed, self._slot, _ATTEMPTS]))
        return dict(zip(search_space, vector, strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Only for parameters that are not layers of the space."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner.after_trial(study, trial, state, values)

    def _ask_inner(
        self, study: Study, trial: FrozenTrial, attempt: int, taken: set[Vector] | None = None
    ) -> dict[str, Any]:
        """What a fresh inner sampler, told all that is known, draws jointly."""
        seed = int(np.random.default_rng([self._seed, self._slot, attempt]).integers(2**31))
        self._inner = self._make(seed=seed)
        if isinstance(self._inner, InformedSampler):
            self._inner.costs, self._inner.permitted = self._costs or self._inner.costs, self._permitted
            self._inner.taken = taken or set()
        return self._inner.sample_relative(study, trial, self._inner.infer_relative_search_space(study, trial))

    def _propose(self, study: Study, trial: FrozenTrial, attempt: int, taken: set[Vector]) -> Vector:
        """One proposal of the inner sampler, drawn jointly or layer by layer as it prefers."""
        joint = self._ask_inner(study, trial, attempt, taken)
        return tuple(
            joint[name] if name in joint else self._inner.sample_independent(study, trial, name, distribution)
            for name, distribution in self.distributions.items()
        )

    def _nearest(self, start: Vector, taken: set[Vector], rng: np.random.Generator) -> Vector:
        """Of the vectors that may be proposed one that differs in the fewest layers, at first a random one of these."""
        layers = Layers.of(list(self.distributions.values()))
        differs_LK = np.arange(len(layers.levels_K)) != layers.choices([start]).T
        noise = 0.5 / len(differs_LK)  # in all smaller than one layer
        while True:
            penalties_LK = differs_LK + rng.uniform(0.0, noise, differs_LK.shape)
            vectors_NL = best_vectors(np.where(layers.allowed_LK, penalties_LK, np.inf), None, layers.levels_K)
            if self._permitted is not None:
                vectors_NL = vectors_NL[self._permitted(layers.levels_K[vectors_NL])]
            nearest_first = penalties_LK[np.arange(len(penalties_LK)), vectors_NL].sum(axis=1).argsort()
            for vector in map(tuple, layers.levels_K[vectors_NL[nearest_first]].tolist()):
                if vector not in taken:
                    return vector
            noise = min(2 * noise, _MOST_NOISE)  # until distance counts for nothing
