"""A wrapper that makes any Optuna sampler propose only vectors that nobody has claimed yet, and resume exactly.

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

from nas.space import SearchSpace, Vector

_ATTEMPTS = 20


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
    """

    def __init__(
        self,
        make: Callable[..., BaseSampler],
        space: SearchSpace,
        seed: int,
        first: Sequence[Vector] = (),
        claimed: Callable[[], set[Vector]] = set,
    ) -> None:
        self._make, self._space, self._seed, self._first, self._claimed = make, space, seed, first, claimed
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

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All layers: a proposal is always a whole vector."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The settled vector of the slot, or one that is neither claimed nor in a finished trial."""
        if self._settled is not None:
            self._propose(study, trial, attempt=0)  # lets the sampler make its notes, as NSGA-II does on generations
            return dict(zip(search_space, self._settled, strict=True))
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        taken = {vector_of(other, self._space) for other in finished} | self._claimed() | set(self._first)
        for attempt in range(_ATTEMPTS):
            proposal = self._propose(study, trial, attempt)
            if tuple(proposal[name] for name in search_space) not in taken:
                return proposal
        return self._unseen(proposal, taken, np.random.default_rng([self._seed, self._slot, _ATTEMPTS]))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Only for parameters that are not layers of the space."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner.after_trial(study, trial, state, values)

    def _propose(self, study: Study, trial: FrozenTrial, attempt: int) -> dict[str, Any]:
        """One proposal of the inner sampler, drawn jointly or layer by layer as it prefers."""
        seed = int(np.random.default_rng([self._seed, self._slot, attempt]).integers(2**31))
        self._inner = self._make(seed=seed)
        joint = self._inner.infer_relative_search_space(study, trial)
        proposal = self._inner.sample_relative(study, trial, joint)
        return {
            name: proposal[name]
            if name in proposal
            else self._inner.sample_independent(study, trial, name, distribution)
            for name, distribution in self.distributions.items()
        }

    def _unseen(self, start: dict[str, Any], taken: set[Vector], rng: np.random.Generator) -> dict[str, Any]:
        """Walks from a proposal, one random layer at a time, until the vector is new."""
        assert len(taken) < self._space.size, "asked for a new vector of an exhausted space"
        vector = list(start.values())
        while tuple(vector) in taken:
            layer = int(rng.integers(len(vector)))
            vector[layer] = self._space.choices[layer][int(rng.integers(len(self._space.choices[layer])))]
        return dict(zip(start, vector, strict=True))
