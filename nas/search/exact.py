"""The exact best vectors where a loss is a sum over layers and every cost depends on counts alone.

Layers of one shape are interchangeable for latency and memory, so a cost depends only on how many layers have each
number of groups. Where the loss is a sum of penalties of the layers (and of couplings of neighbours), dynamic
programming over (layers so far, counts, choice of the last layer) finds the best vector for *every* combination of
counts: 561 of them for 32 layers with three choices, among 3^32 vectors, in milliseconds. The front of loss against any
such costs is among these.

Choices are numbered 0 … K - 1. Shape suffixes: L layers, K choices, T combinations of counts, W weights.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True)
class BestVectors:
    """The best vector for each of many totals, as choices, and its loss."""

    vectors_TL: Ints
    losses_T: Floats


def best_by_counts(penalties_LK: Floats, couplings_MKK: Floats | None = None) -> BestVectors:
    """The vector of least loss for every combination of counts: how many layers have each choice.

    The loss of vector v is the sum over layers of ``penalties[l, v[l]]``, infinite where a layer lacks that choice,
    plus, where there are couplings, the sum over the M = L - 1 pairs of neighbours of ``couplings[l, v[l], v[l + 1]]``.

    Raises:
        ValueError: The shapes do not go together, or a value is NaN.

    Example:
        Two layers, the second twice as sensitive as the first, with choices 0 (worse) and 1:

        >>> best = best_by_counts(np.array([[1.0, 0.0], [2.0, 0.0]]))
        >>> for vector, loss in zip(best.vectors_TL, best.losses_T):
        ...     print(vector, loss)
        [0 0] 3.0
        [0 1] 1.0
        [1 1] 0.0
    """
    choices = penalties_LK.shape[1]
    return best_by_weights(penalties_LK, couplings_MKK, np.eye(choices, dtype=int)[:, 1:])


def best_by_weights(penalties_LK: Floats, couplings_MKK: Floats | None, weights_KW: Ints) -> BestVectors:
    """As `best_by_counts`, for every total of weights: whole numbers, not negative, that each choice adds to it."""
    layers, choices = penalties_LK.shape
    couplings = np.zeros((layers - 1, choices, choices)) if couplings_MKK is None else couplings_MKK
    if couplings.shape != (layers - 1, choices, choices):
        raise ValueError(f"couplings have shape {couplings.shape}, but {(layers - 1, choices, choices)} are needed")
    if np.isnan(penalties_LK).any() or np.isnan(couplings).any():
        raise ValueError("a penalty or coupling is NaN")
    # best[k, t1, t2, …]: least loss of the layers so far that end with choice k and have the totals t1, t2, …
    grid = tuple(1 + layers * weights_KW.max(axis=0))
    best = np.full((choices, *grid), np.inf)
    for choice in range(choices):
        best[(choice, *weights_KW[choice])] = penalties_LK[0, choice]
    befores = np.zeros((layers, choices, *grid), dtype=np.int8)  # the choice before, on the way to that best
    for layer in range(1, layers):
        extended = np.full_like(best, np.inf)
        for choice in range(choices):
            ways = best + couplings[layer - 1, :, choice].reshape(-1, *(1,) * len(grid))
            before = ways.argmin(axis=0)
            least = np.take_along_axis(ways, before[None], axis=0)[0] + penalties_LK[layer, choice]
            to = tuple(slice(weight, None) for weight in weights_KW[choice])
            source = tuple(slice(None, -weight or None) for weight in weights_KW[choice])
            extended[choice, ...][to] = least[source]
            befores[layer, choice, ...][to] = before[source]
        best = extended
    return _trace_back(best, befores, weights_KW)


def _trace_back(best: Floats, befores: npt.NDArray[np.int8], weights_KW: Ints) -> BestVectors:
    last = best.argmin(axis=0)
    losses = np.take_along_axis(best, last[None], axis=0)[0]
    reached = np.isfinite(losses)
    left, choice = np.argwhere(reached), last[reached]
    vectors = np.empty((len(left), len(befores)), dtype=np.intp)
    for layer in reversed(range(len(befores))):
        vectors[:, layer] = choice
        before = befores[(layer, choice, *left.T)]
        left = left - weights_KW[choice]
        choice = before.astype(np.intp)
    return BestVectors(vectors, losses[reached])
