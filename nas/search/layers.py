"""The layers of a search space as a study's parameters state them: vectors as rows of choice numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution

Ints = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Layers:
    """What each layer may be.

    Attributes:
        levels_K: The numbers of groups that any layer may have, ascending; choice k is ``levels_K[k]`` groups.
        allowed_LK: Which choices each layer has.
    """

    levels_K: Ints
    allowed_LK: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, distributions: Sequence[BaseDistribution]) -> "Layers":
        """From the distributions of a study's parameters, one a layer.

        Raises:
            ValueError: One is not categorical over numbers.
        """
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

    def random(self, count: int, rng: np.random.Generator) -> Ints:
        """Random vectors, (count, L)."""
        return np.stack([rng.choice(np.flatnonzero(allowed), size=count) for allowed in self.allowed_LK], axis=1)
