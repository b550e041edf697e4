"""Samplers of whole vectors, and a wrapper with which none proposes a vector twice, and all resume exactly.

Every proposal is seeded by the study's seed and by how many evaluations precede it, never by how often this process
asked before: a search that was killed and resumed proposes what the uninterrupted one would have, and workers on one
study draw differently.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from nas.search.exact import Floats, Ints, best_by_counts, best_by_weights
from nas.search.problem import Problem
from nas.space import Vector

Costs = Callable[[Ints], Floats]  # of vectors (N, L) to objectives (N, O); NaN for what is not known beforehand
# A sampler's attribute, if it has one, and the system attribute of trials: what a proposal is expected to add to the
# front's hypervolume, as a share of it; None where it comes from no model.
PROMISED = "promised"
COUNTED = (TrialState.COMPLETE, TrialState.RUNNING)  # the trials whose vectors are taken
# budget=auto ends a search when so many proposals in a row promised less than this share of the front's hypervolume.
_LEAST_PROMISED, _PATIENCE = 1e-4, 10
WHY_CONVERGED = (
    f"none of the last {_PATIENCE} proposals promised to add {_LEAST_PROMISED:.2%} to the front's hypervolume"
)
_CELLS = 50_000  # of the table of counts; a larger one takes too long
_ATTEMPTS = 20
_MOST_NOISE = 1e6


@dataclass(frozen=True)
class Layers:
    """What each layer may be, as a study's parameters state it."""

    levels_K: Ints  # the numbers of groups that any layer may have, ascending; choice k is levels_K[k] groups
    allowed_LK: npt.NDArray[np.bool_]  # which choices each layer has

    @classmethod
    def of(cls, distributions: Iterable[BaseDistribution]) -> "Layers":
        """From the distributions of a study's parameters, one per layer."""
        allowed: list[Any] = []
        for one in distributions:
            if not isinstance(one, CategoricalDistribution) or not all(isinstance(way, int) for way in one.choices):
                raise ValueError(f"{one} is no choice among whole numbers; this sampler takes nothing else")
            allowed.append(one.choices)
        levels = np.unique(np.concatenate(allowed))
        return cls(levels, np.array([np.isin(levels, groups) for groups in allowed]))

    def choices(self, vectors: Iterable[Sequence[int]]) -> Ints:
        """Vectors of groups as choices, (N, L)."""
        groups = np.array([list(vector) for vector in vectors], dtype=np.intp).reshape(-1, len(self.allowed_LK))
        return np.searchsorted(self.levels_K, groups)

    @property
    def size(self) -> float:
        """How many vectors there are."""
        return float(np.prod(self.allowed_LK.sum(axis=1), dtype=float))

    def all(self) -> Ints:
        """Every vector, as choices (size, L)."""
        axes = np.meshgrid(*map(np.flatnonzero, self.allowed_LK), indexing="ij")
        return np.stack([axis.ravel() for axis in axes], axis=1)

    def one_at_a_time(self) -> Ints:
        """Choices (L, L): each layer once at its smallest one, all others at their largest."""
        smallest_L = self.allowed_LK.argmax(axis=1)
        largest_L = len(self.levels_K) - 1 - self.allowed_LK[:, ::-1].argmax(axis=1)
        return np.asarray(np.where(np.eye(len(smallest_L), dtype=bool), smallest_L, largest_L))

    def random(self, count: int, rng: np.random.Generator) -> Ints:
        """Choices (count, L), every choice that a layer allows as likely as its others."""
        return np.stack([rng.choice(np.flatnonzero(row), size=count) for row in self.allowed_LK], axis=1)

    def best(self, penalties_LK: Floats | float, couplings_MKK: Floats | None = None) -> Ints:
        """Choices (T, L): of `best_by_counts`, or where counts are too many, the best for every total of groups."""
        penalties_LK = np.where(self.allowed_LK, penalties_LK, np.inf)
        if (len(penalties_LK) + 1) ** (len(self.levels_K) - 1) <= _CELLS:
            return best_by_counts(penalties_LK, couplings_MKK).vectors_TL
        return best_by_weights(penalties_LK, couplings_MKK, self.levels_K[:, None]).vectors_TL


class InformedSampler(BaseSampler):
    """A sampler that makes use of more than a study's trials: `DistinctSampler` sets these before every proposal."""

    costs: Costs | None = None
    permitted: Callable[[Ints], npt.NDArray[np.bool_]] | None = None  # which vectors of groups (N, L); None: all
    taken: Set[Vector] = frozenset()  # must not be proposed, beside the vectors of the study's trials
    evaluations: int | None = None  # how many the search will have; None: unknown


def has_converged(promised: Sequence[float | None]) -> bool:
    """Whether the last proposals, of which the one promised so much each, say that little is left to find.

    Jones et al. (1998) stop at an expected improvement below a share of the best value, Nguyen et al. (2017) bound the
    regret by it; for two objectives that is the hypervolume. A proposal without a model promises nothing known.
    """
    last = promised[-_PATIENCE:]
    return len(last) == _PATIENCE and all(share is not None and share < _LEAST_PROMISED for share in last)


@dataclass(eq=False)
class DistinctSampler(BaseSampler):
    """Proposes what an inner sampler proposes, unless the study has it already. Serves one study.

    Some vectors come before all that: those of failed trials, which a dead worker left, unless another one has them;
    and then the ``first`` ones, in order. What is taken or breaks a limit becomes the nearest that may be proposed.
    """

    make: Callable[..., BaseSampler]  # the inner sampler, from a ``seed``
    problem: Problem
    seed: int
    first: Sequence[Vector]
    evaluations: int  # how many the search will have

    def __post_init__(self) -> None:
        self.choices = {f"layer_{index:02d}": choices for index, choices in enumerate(self.problem.space.choices)}
        self._inner = self.make(seed=self.seed)

    def vectors_of(self, trials: Iterable[FrozenTrial]) -> dict[Vector, FrozenTrial]:
        """Trials by vector, as far as they have one; of the same vector the first counts."""
        found: dict[Vector, FrozenTrial] = {}
        for trial in trials:
            if len(trial.params) == len(self.choices):
                found.setdefault(tuple(trial.params[name] for name in self.choices), trial)
        return found

    def before(self, number: int, trials: Iterable[FrozenTrial]) -> tuple[set[Vector], int]:
        """The vectors of the trials below a number, and how many of these have none yet."""
        below = [trial for trial in trials if trial.number < number]
        return set(self.vectors_of(below)), sum(len(trial.params) < len(self.choices) for trial in below)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(choices) for name, choices in self.choices.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A vector that no running or finished trial has; any where there is none."""
        others = [other for other in study.get_trials(deepcopy=False, states=COUNTED) if other.number != trial.number]
        vectors, proposing = self.before(trial.number, others)
        slot, taken = len(vectors) + proposing, set(self.vectors_of(others))
        failed = self.vectors_of(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
        queue = [vector for vector in dict.fromkeys([*failed, *self.first]) if vector not in taken]
        if proposing < len(queue):  # as many workers propose at this moment, and take those before
            # NSGA-II records generations in the study even where its proposal is not used; an InformedSampler nothing.
            if not isinstance(self._inner, InformedSampler):
                self._ask_inner(study, trial, slot, attempt=0)
            vector = queue[proposing]
            if vector in failed:
                self._note(study, trial, failed[vector].system_attrs.get(PROMISED))
        elif len(taken := taken.union(queue)) >= self.problem.size:
            vector = min(taken)
        else:
            vector = self._proposed(study, trial, search_space, slot, taken)
        return dict(zip(search_space, vector, strict=True))

    def _proposed(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution], slot: int, taken: set[Vector]
    ) -> Vector:
        """What the inner sampler proposes for the ``slot``, or the nearest vector that is free and keeps all limits."""
        for attempt in range(_ATTEMPTS):
            joint = self._ask_inner(study, trial, slot, attempt, taken)
            vector = tuple(
                joint[name] if name in joint else self._inner.sample_independent(study, trial, name, distribution)
                for name, distribution in search_space.items()
            )
            if vector not in taken:
                break
        self._note(study, trial, getattr(self._inner, PROMISED, None))
        if vector in taken or not self.problem.keeps_limits(vector):
            rng = np.random.default_rng([self.seed, slot, _ATTEMPTS])
            vector = self._nearest(vector, taken, Layers.of(search_space.values()), rng)
        return vector

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Only for parameters that are not layers of the space."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner.after_trial(study, trial, state, values)

    def _note(self, study: Study, trial: FrozenTrial, promised: float | None) -> None:
        """Keeps what a proposal promised where all workers and later processes find it."""
        if promised is not None:
            study._storage.set_trial_system_attr(trial._trial_id, PROMISED, promised)

    def _ask_inner(
        self, study: Study, trial: FrozenTrial, slot: int, attempt: int, taken: Iterable[Vector] = ()
    ) -> dict[str, Any]:
        """What a fresh inner sampler, told all that is known, draws jointly."""
        seed = int(np.random.default_rng([self.seed, slot, attempt]).integers(2**31))
        self._inner = self.make(seed=seed)
        if isinstance(self._inner, InformedSampler):
            self._inner.costs, self._inner.permitted = self.problem.known_objectives, self.problem.permits
            self._inner.taken, self._inner.evaluations = frozenset(taken), self.evaluations
        return self._inner.sample_relative(study, trial, self._inner.infer_relative_search_space(study, trial))

    def _nearest(self, start: Vector, taken: set[Vector], layers: Layers, rng: np.random.Generator) -> Vector:
        """Of the vectors that may be proposed one that differs in the fewest layers, at first a random one of these."""
        differs_LK = np.arange(len(layers.levels_K)) != layers.choices([start]).T
        noise = 0.5 / len(differs_LK)  # in all smaller than one layer
        while True:
            penalties_LK = differs_LK + rng.uniform(0.0, noise, differs_LK.shape)
            vectors_NL = layers.best(penalties_LK)
            nearest_first = penalties_LK[np.arange(len(penalties_LK)), vectors_NL].sum(axis=1).argsort()
            groups_NL = layers.levels_K[vectors_NL[nearest_first]]
            for vector in map(tuple, groups_NL[self.problem.permits(groups_NL)].tolist()):
                if vector not in taken:
                    return vector
            noise = min(2 * noise, _MOST_NOISE)  # until distance counts for nothing
