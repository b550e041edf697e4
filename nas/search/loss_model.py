"""A Bayesian model of the loss of vectors: a sum over layers, coupled neighbours, and noise.

Going down to choice t or below costs a layer a step, the same in all layers but for a deviation of its own; each pair
of neighbours adds a coupling for their two choices; what is left is noise of each vector's own, so that the model is
exact on what was evaluated. All of these are normal a priori, fewer groups being worse; how large deviations, couplings
and noise are is learned from the losses by marginal likelihood. The posterior is that of a Gaussian process; it can be
drawn from, and every draw is a set of penalties and couplings, for which `nas.search.exact` finds the best vectors.

Choices are numbered 0 … K - 1, fewest groups first. Shape suffixes: N vectors, L layers, K choices, M = L - 1 pairs of
neighbours, P features.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

_TYPICAL = {"step": 0.7, "coupling": 0.15, "noise": 0.05}  # expected, in units of a layer's mean penalty …
_SPREAD = {"step": 0.7, "coupling": 1.0, "noise": 1.5}  # … and how far from that they may be, in natural logarithms
_LEAST_NOISE = 1e-3  # of a unit: keeps the kernel positive definite
_RETUNE = (6, 9, 13, 18, 25, 35, 49, 69, 97, 136, 190)  # evaluations at which the hyperparameters are learned again


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


@dataclass(frozen=True)
class Hyperparameters:
    """Standard deviations a priori, in units of a layer's mean penalty."""

    step: tuple[float, ...]
    coupling: float
    noise: float


class LossModel:
    """The model, given the losses of some vectors; at least two."""

    def __init__(self, vectors_NL: Ints, losses_N: Floats, choices: int) -> None:
        self._choices, self._layers = choices, vectors_NL.shape[1]
        self._unit = max(float(np.ptp(losses_N)) / self._layers, 1e-12)
        self._features_NP = _features(vectors_NL, choices)
        count = max((number for number in _RETUNE if number <= len(losses_N)), default=0)
        rows = (np.ascontiguousarray(vectors_NL[:count]), np.ascontiguousarray(losses_N[:count]))
        evaluated = rows[0].tobytes(), rows[1].tobytes()
        self.hyperparameters = _learned_hyperparameters(*evaluated, count, self._layers, choices)
        self._variances_P = _variances(self.hyperparameters, self._layers, choices, self._unit)
        self._expected_P = _expected(self._layers, choices, self._unit)
        self._mean_loss = float((losses_N - self._features_NP @ self._expected_P).mean())
        self._noise_variance = (self.hyperparameters.noise * self._unit) ** 2
        kernel = (self._features_NP * self._variances_P) @ self._features_NP.T
        kernel[np.diag_indices_from(kernel)] += self._noise_variance
        self._root = cholesky(kernel, lower=True, overwrite_a=True)
        self._residual_N = losses_N - self._mean_loss - self._features_NP @ self._expected_P

    def mean(self) -> LayerLosses:
        """The posterior mean."""
        return self._conditioned(np.zeros(len(self._variances_P)), np.zeros(len(self._residual_N)))

    def draw(self, rng: np.random.Generator) -> LayerLosses:
        """A draw from the posterior: one from the prior, corrected by what it gets wrong (Matheron's rule)."""
        weights_P = rng.normal(size=len(self._variances_P)) * np.sqrt(self._variances_P)
        noise_N = rng.normal(size=len(self._residual_N)) * np.sqrt(self._noise_variance)
        return self._conditioned(weights_P, noise_N)

    def deviations(self, vectors_NL: Ints) -> Floats:
        """Posterior standard deviations of the losses of vectors that were not evaluated, shape (N,)."""
        features = _features(vectors_NL, self._choices)
        scaled = features * self._variances_P
        explained = solve_triangular(self._root, self._features_NP @ scaled.T, lower=True, check_finite=False)
        variances = (scaled * features).sum(axis=1) + self._noise_variance - (explained**2).sum(axis=0)
        return np.asarray(np.sqrt(np.maximum(variances, 0.0)))

    def _conditioned(self, weights_P: Floats, noise_N: Floats) -> LayerLosses:
        wrong = self._residual_N - self._features_NP @ weights_P - noise_N
        correction = self._features_NP.T @ cho_solve((self._root, True), wrong, check_finite=False)
        weights = self._expected_P + weights_P + self._variances_P * correction
        steps, layers = self._choices - 1, self._layers
        offset, common = weights[0], weights[1 : 1 + steps]
        own_SL = weights[1 + steps :][: steps * layers].reshape(steps, layers)
        couplings = weights[1 + steps + steps * layers :].reshape(layers - 1, self._choices, self._choices)
        penalties = np.zeros((layers, self._choices))
        for step in range(steps):  # a choice pays for every step from the largest one down to it
            penalties[:, : step + 1] += (common[step] + own_SL[step])[:, None]
        return LayerLosses(self._mean_loss + float(offset), penalties, couplings)


def _features(vectors_NL: Ints, choices: int) -> Floats:
    """What a vector has of each weight, (N, P): 1; layers at or below each step; each of them; pairs of neighbours."""
    rows, layers = vectors_NL.shape
    below_NSL = vectors_NL[:, None, :] <= np.arange(choices - 1)[:, None]
    pairs = vectors_NL[:, :-1] * choices + vectors_NL[:, 1:]
    coupled = np.zeros((rows, layers - 1, choices**2))
    np.put_along_axis(coupled, pairs[:, :, None], 1.0, axis=2)
    blocks = [np.ones((rows, 1)), below_NSL.sum(axis=2), below_NSL.reshape(rows, -1), coupled.reshape(rows, -1)]
    return np.concatenate(blocks, axis=1, dtype=float)


def _variances(prior: Hyperparameters, layers: int, choices: int, unit: float) -> Floats:
    """Prior variance of each feature's weight, (P,)."""
    own = np.repeat(np.square(prior.step), layers)
    coupled = np.full((layers - 1) * choices**2, prior.coupling**2)
    return np.concatenate(([layers**2], np.full(choices - 1, 4.0), own, coupled)) * unit**2


def _expected(layers: int, choices: int, unit: float) -> Floats:
    """Prior mean of each feature's weight, (P,): each step costs each layer its share of the whole range."""
    steps = choices - 1
    others = np.zeros(steps * layers + (layers - 1) * choices**2)
    return np.concatenate(([0.0], np.full(steps, unit / max(steps, 1)), others))


@lru_cache(maxsize=64)
def _learned_hyperparameters(vectors: bytes, losses: bytes, count: int, layers: int, choices: int) -> Hyperparameters:
    """The hyperparameters of greatest posterior, a pure function of the vectors and losses that it learns from."""
    steps = choices - 1
    typical = np.log([*[_TYPICAL["step"]] * steps, _TYPICAL["coupling"], _TYPICAL["noise"]])
    spread = np.array([*[_SPREAD["step"]] * steps, _SPREAD["coupling"], _SPREAD["noise"]])
    if not count:
        return _hyperparameters(typical)
    vectors_NL = np.frombuffer(vectors, dtype=np.intp).reshape(count, layers)
    losses_N = np.frombuffer(losses)
    unit = max(float(np.ptp(losses_N)) / layers, 1e-12)
    features = _features(vectors_NL, choices)
    residual = losses_N / unit - features @ _expected(layers, choices, 1.0)
    residual = residual - residual.mean()
    cuts = np.cumsum([1 + steps, *[layers] * steps])
    fixed, *own, coupled = np.split(features, cuts, axis=1)
    base = (fixed * _variances(_hyperparameters(typical), layers, choices, 1.0)[: 1 + steps]) @ fixed.T
    grams = [block @ block.T for block in (*own, coupled)]

    def negative_log_posterior(logs: Floats) -> float:
        kernel = base + sum(np.exp(2 * log) * gram for log, gram in zip(logs[:-1], grams, strict=True))
        kernel[np.diag_indices_from(kernel)] += _hyperparameters(logs).noise ** 2
        try:
            root = cholesky(kernel, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            return np.inf
        fit = solve_triangular(root, residual, lower=True, check_finite=False)
        deviation = ((logs - typical) / spread) ** 2
        return float(0.5 * fit @ fit + np.log(np.diag(root)).sum() + 0.5 * deviation.sum())

    options = {"maxfev": 120, "xatol": 0.05, "fatol": 0.05}
    found = minimize(negative_log_posterior, typical, method="Nelder-Mead", options=options)  # type: ignore[call-overload]
    return _hyperparameters(found.x)


def _hyperparameters(logs: Floats) -> Hyperparameters:
    *step, coupling, noise = np.exp(logs)
    return Hyperparameters(tuple(map(float, step)), float(coupling), max(float(noise), _LEAST_NOISE))
