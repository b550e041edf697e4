"""What samplers of whole vectors share: costs that are known beforehand, and vectors as rows of choice numbers."""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Costs = Callable[[Ints], Floats]
"""Objectives (N, O) of vectors of groups (N, L), as far as they are known without evaluation; NaN where not. They
depend only on how many layers have each number of groups."""
Permitted = Callable[[Ints], npt.NDArray[np.bool_]]
"""Which of some vectors of groups (N, L) may be proposed."""


class InformedSampler(BaseSampler):
    """A sampler of whole vectors that makes use of more than a study's trials, where it is told.

    Attributes:
        costs: The objectives that are known beforehand; None: none.
        permitted: What may be proposed; None: everything.
        taken: Vectors that must not be proposed, beside those of the study's trials.
        evaluations: How many the search will have; None: unknown.
    """

    costs: Costs | None = None
    permitted: Permitted | None = None
    taken: Set[tuple[int, ...]] = frozenset()
    evaluations: int | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters of the last finished trial."""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return dict(finished[-1].distributions) if finished else {}


@dataclass(frozen=True)
class Layers:
    """What each layer may be, as a study's parameters state it.

    Attributes:
        levels_K: The numbers of groups that any layer may have, ascending; choice k is ``levels_K[k]`` groups.
        allowed_LK: Which choices each layer has.
    """

    levels_K: Ints
    allowed_LK: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, distributions: Iterable[BaseDistribution]) -> "Layers":
        """From the distributions of a study's parameters, one per layer.

        Raises:
            ValueError: One is not categorical over whole numbers.
        """
        distributions = list(distributions)
        allowed = [set(getattr(distribution, "choices", ())) for distribution in distributions]
        for distribution, groups in zip(distributions, allowed, strict=True):
            if not isinstance(distribution, CategoricalDistribution) or not all(isinstance(g, int) for g in groups):
                raise ValueError(f"{distribution} is no choice among whole numbers; this sampler takes nothing else")
        levels = sorted(set().union(*allowed))
        return cls(np.array(levels, dtype=np.intp), np.array([[level in some for level in levels] for some in allowed]))

    @property
    def size(self) -> float:
        """How many vectors there are."""
        return float(np.prod(self.allowed_LK.sum(axis=1), dtype=float))

    def choices(self, vectors: Iterable[Sequence[int]]) -> Ints:
        """Vectors of groups as choices, (N, L)."""
        groups = np.array([list(vector) for vector in vectors], dtype=np.intp).reshape(-1, len(self.allowed_LK))
        return np.searchsorted(self.levels_K, groups)

    def all_vectors(self) -> Ints:
        """Every vector, (N, L), in lexicographic order."""
        axes = np.meshgrid(*map(np.flatnonzero, self.allowed_LK), indexing="ij")
        return np.stack([axis.ravel() for axis in axes], axis=1)

    def one_at_a_time(self) -> Ints:
        """The L vectors in which one layer has its smallest choice and all others have their largest, (L, L)."""
        smallest, largest = self.allowed_LK.argmax(1), len(self.levels_K) - 1 - self.allowed_LK[:, ::-1].argmax(1)
        return np.where(np.eye(len(smallest), dtype=bool), smallest, largest)

    def random(self, count: int, rng: np.random.Generator) -> Ints:
        """Random vectors, (count, L)."""
        return np.stack([rng.choice(np.flatnonzero(allowed), size=count) for allowed in self.allowed_LK], axis=1)
