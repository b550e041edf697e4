"""Expected hypervolume improvement of a vector of known costs and uncertain loss. Everything is minimised."""

import moocore
import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]


def expected_hypervolume_improvement(
    means_N: Floats, deviations_N: Floats, costs_NC: Floats, front: Floats, reference: Floats
) -> Floats:
    """How much each candidate is expected to add to the hypervolume of the front.

    At loss u a candidate with costs c adds, of the hypervolume of costs, what the front's points with losses up to u
    leave uncovered; the expectation is the integral of that over u, times the probability that the loss is below u. It
    is a step function of u, and the integral of a normal distribution's probability is elementary.

    Losses are normally distributed, a deviation of 0 being certainty. Front and reference point have loss and costs,
    (F, 1 + C) and (1 + C,).
    """
    ordered = front[np.argsort(front[:, 0], kind="stable")]
    edges_E = np.concatenate((ordered[:, 0], reference[:1]))  # the upper end of each slice of losses
    below_NE = _integral(edges_E, means_N[:, None], np.maximum(deviations_N, 1e-12)[:, None])
    weights_NE = np.diff(below_NE, axis=1, prepend=0.0)
    return np.asarray((weights_NE * _uncovered(costs_NC, ordered[:, 1:], reference[1:])).sum(axis=1))


def _integral(u: Floats, mean: Floats, deviation: Floats) -> Floats:
    """The integral up to ``u`` of the probability that a normal variable is smaller."""
    z = (u - mean) / deviation
    return np.asarray((u - mean) * ndtr(z) + deviation * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))


def _uncovered(costs_NC: Floats, front_FC: Floats, reference_C: Floats) -> Floats:
    """The hypervolume that each candidate's costs add to those of the front's first 0, 1, … F points, (N, F + 1)."""
    if costs_NC.shape[1] == 1:
        best_E = np.minimum.accumulate(np.concatenate((reference_C, front_FC[:, 0])))
        return np.maximum(0.0, best_E - costs_NC)
    different, which = np.unique(costs_NC, axis=0, return_inverse=True)  # vectors of the same counts cost the same
    found = np.empty((len(different), len(front_FC) + 1))
    for points in range(found.shape[1]):
        base = front_FC[:points]
        covered = moocore.hypervolume(base, ref=reference_C) if points else 0.0
        for number, costs in enumerate(different):
            found[number, points] = moocore.hypervolume(np.vstack((base, costs)), ref=reference_C) - covered
    return found[which.ravel()]
