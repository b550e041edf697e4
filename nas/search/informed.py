"""What samplers of whole vectors share: costs that are known beforehand, and vectors as rows of choice numbers."""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Costs = Callable[[Ints], Floats]  # of vectors (N, L) to objectives (N, O); NaN for what is not known beforehand


class InformedSampler(BaseSampler):
    """A sampler of whole vectors that makes use of more than a study's trials.

    `nas.search.sampler.DistinctSampler` sets these attributes before every proposal.
    """

    costs: Costs | None = None
    permitted: Callable[[Ints], npt.NDArray[np.bool_]] | None = None  # which vectors of groups (N, L); None: all
    taken: Set[tuple[int, ...]] = frozenset()  # must not be proposed, beside the vectors of the study's trials
    evaluations: int | None = None  # how many the search will have; None: unknown


@dataclass(frozen=True)
class Layers:
    """What each layer may be, as a study's parameters state it."""

    levels_K: Ints  # the numbers of groups that any layer may have, ascending; choice k is levels_K[k] groups
    allowed_LK: npt.NDArray[np.bool_]  # which choices each layer has

    @classmethod
    def of(cls, distributions: Iterable[BaseDistribution]) -> "Layers":
        """From the distributions of a study's parameters, one per layer."""
        allowed = []
        for distribution in distributions:
            allowed.append(getattr(distribution, "choices", [None]))
            if not all(isinstance(groups, int) for groups in allowed[-1]):
                raise ValueError(f"{distribution} is no choice among whole numbers; this sampler takes nothing else")
        levels = np.unique(np.concatenate(allowed))
        return cls(levels, np.array([np.isin(levels, groups) for groups in allowed]))

    def choices(self, vectors: Iterable[Sequence[int]]) -> Ints:
        """Vectors of groups as choices, (N, L)."""
        groups = np.array([list(vector) for vector in vectors], dtype=np.intp).reshape(-1, len(self.allowed_LK))
        return np.searchsorted(self.levels_K, groups)

    def one_at_a_time(self) -> Ints:
        """The L vectors in which one layer has its smallest choice and all others have their largest, (L, L)."""
        smallest, largest = self.allowed_LK.argmax(1), len(self.levels_K) - 1 - self.allowed_LK[:, ::-1].argmax(1)
        return np.asarray(np.where(np.eye(len(smallest), dtype=bool), smallest, largest))
