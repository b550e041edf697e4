"""Vectors by their total of groups: how many there are of each total, and uniform draws among them.

Layers drawn with equal odds crowd around the middle total; drawing the total first spreads vectors over the range.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nas.space import Vector


class Totals:
    """The vectors of a space, whose layers allow ``choices``, by their total."""

    def __init__(self, choices: Sequence[Vector]) -> None:
        self._choices = choices
        # ways[l][t]: in how many ways layers l, l + 1, … add up to t; floats, as 3^32 and more are odds to us
        self._ways = np.zeros((len(choices) + 1, sum(map(max, choices)) + 1))
        self._ways[-1, 0] = 1
        for layer in reversed(range(len(choices))):
            for groups in choices[layer]:
                self._ways[layer, groups:] += self._ways[layer + 1, :-groups]
        self.reachable = np.flatnonzero(self._ways[0])  # ascending totals that some vector has

    def count(self, total: int) -> float:
        """How many vectors have this total."""
        return float(self._ways[0, total])

    def draw(self, totals: npt.ArrayLike, rng: np.random.Generator) -> list[Vector]:
        """One vector for each of n reachable ``totals``, uniform among the vectors of that total."""
        left = np.array(totals)
        columns = []
        for allowed, ways in zip(self._choices, self._ways[1:], strict=True):
            groups = np.array(allowed)
            remaining = left[:, None] - groups  # (n, choices)
            odds = np.cumsum(np.where(remaining >= 0, ways[remaining], 0.0), axis=1)
            picked = groups[(rng.random((len(left), 1)) * odds[:, -1:] >= odds).sum(axis=1).clip(max=len(groups) - 1)]
            left = left - picked
            columns.append(picked.tolist())
        return list(zip(*columns, strict=True))

    def draw_stratified(self, vectors: int, rng: np.random.Generator) -> list[Vector]:
        """Vectors whose totals lie one in each of ``vectors`` equal stretches of the range."""
        places = (np.arange(vectors) + rng.random(vectors)) / max(vectors, 1) * len(self.reachable)
        return self.draw(self.reachable[places.astype(int)], rng)
