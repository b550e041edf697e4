"""A Bayesian model of the loss of vectors: a monotone function of a sum over layers, and what such a sum misses.

- The sum: going down to choice t or below costs a layer a step, the same in all layers but for a deviation of its own;
  each pair of neighbours adds a coupling for their two choices. Fewer groups are expected to be worse.
- The link: the loss is a monotone function of the sum, so losses that saturate or explode are a sum all the same. Two
  factors say how bent it is at either end of the evaluated losses (a warped Gaussian process, Snelson et al. 2003).
- The residual: a Gaussian process over the number of layers in which two vectors differ, for layers that interact
  wherever they are; and noise of each vector's own, so that the model is exact on what was evaluated.

All of these are normal a priori. How large they are, and the link, is learned by marginal likelihood: the product of
the probabilities of every evaluation given those before it, so that each is believed as far as it predicts. The
posterior of the sum can be drawn from: every draw is a set of penalties and couplings, for which `nas.search.exact`
finds the best vectors.

Choices are numbered 0 … K - 1, fewest groups first. Shape suffixes: N vectors, L layers, K choices, M = L - 1 pairs of
neighbours, P features.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from nas.search.exact import Floats, Ints

# The hyperparameters: what is expected of each, and the deviation of its logarithm. A layer's mean penalty is the unit.
_PRIOR = {
    "steps": (0.7, 0.7),  # deviation of a layer's own penalty, for each step
    "coupling": (0.15, 1.0),  # deviation of a coupling of neighbours
    "residual": (0.2, 1.5),  # deviation of the residual, per square root of the layers
    "decay": (0.1, 1.0),  # how fast the residual's correlation falls with each layer in which vectors differ
    "noise": (0.02, 1.5),  # deviation of each vector's own noise
    "bends": (0.3, 2.0),  # how much steeper the sum is as a function of the loss at its least and largest, less 1
}
Hyperparameters = dict[str, Tensor]  # vectors: one value per step, two bends, and one of each other
_STARTS = ((0.1, 0.1), (10.0, 0.1), (0.1, 10.0))  # bends from which the most likely ones are looked for
_LEAST_NOISE = 1e-3  # of a unit: keeps the kernel positive definite
_RETUNE = (6, 9, 13, 18, 25, 35, 49, 69, 97, 136, 190, 266, 372, 520)  # evaluations at which all that is learned again


@dataclass(frozen=True)
class LayerLosses:
    """A loss that is a sum over layers and neighbours, as `nas.search.exact.best_by_counts` takes it."""

    offset: float  # the loss of a vector without penalties
    penalties_LK: Floats
    couplings_MKK: Floats

    def of(self, vectors_NL: Ints) -> Floats:
        """Losses of vectors, shape (N,)."""
        layers = np.arange(vectors_NL.shape[1])
        own = self.penalties_LK[layers, vectors_NL].sum(axis=1)
        pairs = self.couplings_MKK[layers[:-1], vectors_NL[:, :-1], vectors_NL[:, 1:]].sum(axis=1)
        return np.asarray(self.offset + own + pairs)


class LossModel:
    """The model, given the losses of some vectors; at least two."""

    def __init__(self, vectors_NL: Ints, losses_N: Floats, choices: int) -> None:
        self._choices, self._layers = choices, vectors_NL.shape[1]
        self._low, self._range = losses_N.min(), max(float(np.ptp(losses_N)), 1e-12)
        count = max((number for number in _RETUNE if number <= len(losses_N)), default=0)
        known = tuple(map(tuple, vectors_NL[:count].tolist())), tuple(losses_N[:count].tolist())
        self._learned = _most_likely(*known, choices)
        self._evaluated = _Inputs(vectors_NL, choices)
        self._variances_P = _variances(self._learned, self._layers)
        scaled_N = (torch.from_numpy(losses_N) - self._low) / self._range
        self._residual_N, self._mean, _ = _residuals(self._learned, self._evaluated, scaled_N)
        self._root = torch.linalg.cholesky(_kernel(self._learned, self._evaluated))
        self._solved_N = self._solve(self._residual_N)

    def mean(self) -> LayerLosses:
        """The posterior mean of the sum, in units of a layer's mean penalty."""
        return self._corrected(torch.zeros_like(self._variances_P), self._residual_N)

    def draw(self, rng: np.random.Generator) -> LayerLosses:
        """A draw from the posterior of the sum: one from the prior, corrected by its errors (Matheron's rule)."""
        weights_P = torch.from_numpy(rng.normal(size=len(self._variances_P))) * self._variances_P.sqrt()
        other = self._learned["noise"] ** 2 + self._layers * self._learned["residual"] ** 2
        others_N = torch.from_numpy(rng.normal(size=len(self._residual_N))) * other.sqrt()
        wrong = self._residual_N - self._evaluated.features @ weights_P - others_N
        return self._corrected(weights_P, wrong)

    def means(self, vectors_NL: Ints) -> Floats:
        """Expected losses of vectors, shape (N,)."""
        return self._to_nats(self._forecast(_Inputs(vectors_NL, self._choices))[0])

    def deviations(self, vectors_NL: Ints) -> Floats:
        """Posterior standard deviations of the losses of vectors that were not evaluated, shape (N,)."""
        vectors = _Inputs(vectors_NL, self._choices)
        sums_N, across = self._forecast(vectors)
        explained = torch.linalg.solve_triangular(self._root, across.T, upper=False).square().sum(dim=0)
        own = vectors.features.square() @ self._variances_P + self._layers * self._learned["residual"] ** 2
        deviations_N = (own + self._learned["noise"] ** 2 - explained).clamp(min=0).sqrt()
        return self._spread(sums_N, deviations_N)

    def left_out(self) -> tuple[Floats, Floats]:
        """Expected loss of each evaluated vector by all the others, and its standard deviation, shape (N,) each."""
        precisions_N = torch.cholesky_inverse(self._root).diagonal()
        prior_N = self._mean + self._evaluated.features @ self._evaluated.expected_P
        sums_N = prior_N + self._residual_N - self._solved_N / precisions_N
        return self._to_nats(sums_N), self._spread(sums_N, precisions_N.rsqrt())

    def _spread(self, sums_N: Tensor, deviations_N: Tensor) -> Floats:
        return (self._to_nats(sums_N + deviations_N) - self._to_nats(sums_N - deviations_N)) / 2

    def _forecast(self, vectors: "_Inputs") -> tuple[Tensor, Tensor]:
        """Expected sums, and their prior covariance with those of what was evaluated."""
        across = _covariance(self._learned, vectors, self._evaluated)
        return self._mean + vectors.features @ vectors.expected_P + across @ self._solved_N, across

    def _to_nats(self, sums_N: Tensor) -> Floats:
        losses = _losses(sums_N / self._layers, self._learned["bends"])
        return np.asarray(self._low + self._range * losses.numpy())

    def _solve(self, values_N: Tensor) -> Tensor:
        return torch.cholesky_solve(values_N[:, None], self._root)[:, 0]

    def _corrected(self, weights_P: Tensor, wrong_N: Tensor) -> LayerLosses:
        """The sum of such weights, beside the expected ones, after they were corrected by their errors."""
        steps, layers = self._choices - 1, self._layers
        correction = self._evaluated.features.T @ self._solve(wrong_N)
        weights = (self._evaluated.expected_P + weights_P + self._variances_P * correction).numpy()
        offset, common, own, couplings = np.split(weights, np.cumsum([1, steps, steps * layers]))
        penalties = np.zeros((layers, self._choices))
        for step, own_L in enumerate(own.reshape(steps, layers)):
            penalties[:, : step + 1] += (common[step] + own_L)[:, None]  # so a choice pays for every step down to it
        couplings_MKK = couplings.reshape(layers - 1, self._choices, self._choices)
        return LayerLosses(float(self._mean + offset[0]), penalties, couplings_MKK)


class _Inputs:
    """Vectors as the kernel takes them."""

    def __init__(self, vectors_NL: Ints, choices: int) -> None:
        rows, self.layers = vectors_NL.shape
        below_NSL = vectors_NL[:, None, :] <= np.arange(choices - 1)[:, None]
        pairs_NM = vectors_NL[:, :-1] * choices + vectors_NL[:, 1:]
        own, coupled = (block.reshape(rows, -1) for block in (below_NSL, np.eye(choices**2)[pairs_NM]))
        # What a vector has of each weight, (N, P): 1; layers at or below each step; each of them; pairs of neighbours.
        features = np.concatenate([np.ones((rows, 1)), below_NSL.sum(axis=2), own, coupled], axis=1, dtype=float)
        self.features = torch.from_numpy(features)
        self.onehot = torch.from_numpy(np.eye(choices)[vectors_NL].reshape(rows, -1))  # (N, L · K)
        # Prior mean of each weight, (P,): each step costs each layer its share of the whole range.
        self.expected_P = torch.zeros(features.shape[1], dtype=torch.float64)
        self.expected_P[1:choices] = 1.0 / max(choices - 1, 1)


def _covariance(learned: Hyperparameters, rows: _Inputs, columns: _Inputs) -> Tensor:
    """Prior covariance of the sums, with the residual but without noise."""
    differing = rows.layers - rows.onehot @ columns.onehot.T
    residual: Tensor = rows.layers * learned["residual"] ** 2 * torch.exp(-learned["decay"] * differing)
    return residual + (rows.features * _variances(learned, rows.layers)) @ columns.features.T


def _kernel(learned: Hyperparameters, evaluated: _Inputs) -> Tensor:
    """Prior covariance of what was evaluated, with noise."""
    kernel = _covariance(learned, evaluated, evaluated)
    return kernel + learned["noise"] ** 2 * torch.eye(len(kernel), dtype=kernel.dtype)


def _variances(learned: Hyperparameters, layers: int) -> Tensor:
    """Prior variance of each feature's weight, (P,)."""
    steps = len(learned["steps"])
    fixed = torch.tensor([layers**2, *[4.0] * steps], dtype=torch.float64)
    own = learned["steps"].square().repeat_interleave(layers)
    return torch.cat((fixed, own, learned["coupling"].square().repeat((layers - 1) * (steps + 1) ** 2)))


def _residuals(learned: Hyperparameters, evaluated: _Inputs, losses_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far the sums (of losses in 0 … 1) lie from what is expected and a common offset; that, and log slopes."""
    sums_N, log_slopes_N = _sums(losses_N, learned["bends"])
    excess_N = sums_N * evaluated.layers - evaluated.features @ evaluated.expected_P
    return excess_N - excess_N.mean(), excess_N.mean(), log_slopes_N


def _sums(losses: Tensor, bends: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (0 … 1: the evaluated range) as sums in the same range, and the logarithm of the slope there."""
    low, low_slopes = _bent(losses, bends[0])
    high, high_slopes = _bent(1 - low, bends[1])
    return 1 - high, low_slopes + high_slopes


def _losses(sums: Tensor, bends: Tensor) -> Tensor:
    """The inverse of `_sums`; beyond 0 … 1 it goes on straight."""
    inside = sums.clamp(0, 1)
    losses = _straightened(1 - _straightened(1 - inside, bends[1]), bends[0])
    return losses + (sums - inside) * torch.exp(-_sums(losses, bends)[1])


def _bent(values: Tensor, bend: Tensor) -> tuple[Tensor, Tensor]:
    """0 … 1 mapped onto itself, at 0 steeper than at 1 by a factor of 1 + bend, and the slope's logarithm."""
    end = torch.log1p(bend)
    return torch.log1p(bend * values) / end, torch.log(bend / end) - torch.log1p(bend * values)


def _straightened(values: Tensor, bend: Tensor) -> Tensor:
    return torch.expm1(values * torch.log1p(bend)) / bend


@lru_cache(maxsize=64)
def _most_likely(vectors: tuple[tuple[int, ...], ...], losses: tuple[float, ...], choices: int) -> Hyperparameters:
    """The hyperparameters of greatest posterior, a pure function of the vectors and losses that it learns from."""
    sizes = [choices - 1, 1, 1, 1, 1, 2]
    prior = torch.tensor(list(_PRIOR.values()), dtype=torch.float64).repeat_interleave(torch.tensor(sizes), dim=0)
    typical, spread = prior[:, 0].log(), prior[:, 1]

    def scales(logarithms: Tensor) -> Hyperparameters:
        learned = dict(zip(_PRIOR, logarithms.exp().split(sizes), strict=True))
        return learned | {"noise": learned["noise"] + _LEAST_NOISE}

    if not losses:
        return scales(typical)
    inputs, losses_N = _Inputs(np.array(vectors), choices), torch.tensor(losses, dtype=torch.float64)
    losses_N = (losses_N - losses_N.min()) / (losses_N.max() - losses_N.min()).clamp(min=1e-12)

    def negative_log_posterior(values: Floats) -> tuple[float, Floats]:
        values_T = torch.tensor(values, requires_grad=True)
        learned = scales(values_T)
        residual_N, _, log_slopes_N = _residuals(learned, inputs, losses_N)
        root, failed = torch.linalg.cholesky_ex(_kernel(learned, inputs))
        if failed:
            return np.inf, np.zeros_like(values)
        fit = torch.linalg.solve_triangular(root, residual_N[:, None], upper=False)
        value = fit.square().sum() / 2 + root.diagonal().log().sum() - log_slopes_N.sum()
        value = value + ((values_T - typical) / spread).square().sum() / 2
        value.backward()
        return value.item(), values_T.grad.numpy()  # type: ignore[union-attr]

    found = []
    for bends in _STARTS:
        start = np.concatenate((typical.numpy()[:-2], np.log(bends)))
        found.append(minimize(negative_log_posterior, start, jac=True, method="L-BFGS-B", options={"maxiter": 40}))
    return scales(torch.from_numpy(min(found, key=lambda one: float(one.fun)).x))
