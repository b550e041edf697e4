"""Which vectors the rows of a supernet step run. Drawn from the seed and the step number, so that a resumed or
distributed run draws the same."""

import numpy as np

from nas.config import SupernetConfig
from nas.space import SearchSpace, Vector


def mixed_vectors(space: SearchSpace, config: SupernetConfig, step: int) -> list[Vector]:
    """One vector a row: shares of largest and smallest ones, and the rest drawn layer by layer.

    Each drawn row first draws how much it favours each choice (uniform on the simplex), then its layers. Layers
    drawn with equal odds would crowd around the middle total of groups; this spreads the totals.

    Returns:
        ``config.batch`` vectors.
    """
    rng = np.random.default_rng([config.seed, step, 1])
    largest = int(config.largest_share * config.batch + rng.random())  # rounds up as often as the fraction says
    smallest = int(config.smallest_share * config.batch + rng.random())
    rows = [space.largest] * largest + [space.smallest] * smallest
    while len(rows) < config.batch:
        weights = rng.dirichlet(np.ones(max(len(allowed) for allowed in space.choices)))
        rows.append(tuple(_draw(rng, allowed, weights) for allowed in space.choices))
    return rows[: config.batch]


def _draw(rng: np.random.Generator, allowed: Vector, weights: np.ndarray) -> int:
    odds = weights[: len(allowed)] / weights[: len(allowed)].sum()
    return allowed[int(rng.choice(len(allowed), p=odds))]
