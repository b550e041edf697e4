"""FrontSampler: learns what each layer loses, solves exactly for the best vectors, and asks for the most promising one.

The first vectors have one layer at its smallest choice each, and all others at their largest, unless there are fewer
than two evaluations per layer. Each later proposal takes four steps:

1. `nas.search.loss_model` learns from all finished trials what each layer adds to the loss, and what a sum misses;
2. `nas.search.exact` finds the best vector for every combination of counts, under the model's mean and under posterior
   samples;
3. for those that are not evaluated yet, the expected hypervolume improvement follows from the model's mean and
   uncertainty of the loss, and from costs that depend on counts alone;
4. the one with the largest is proposed.

It needs nothing but a study, and then learns from the trials which objectives are costs. Where costs are known without
evaluating anything, set `FrontSampler.costs`, and it uses them from the start.
"""

import functools
from collections.abc import Callable
from typing import Any

import moocore
import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import ThreadpoolController

from nas.search.exact import best_vectors
from nas.search.improvement import expected_hypervolume_improvement
from nas.search.informed import Costs, Floats, InformedSampler, Ints, Layers
from nas.search.loss_model import LossModel

_ENUMERATED = 10_000  # vectors; a space no larger is looked at as a whole
_CONSIDERED = 100  # candidates whose own uncertainty is worked out
_DESIGN = 2  # evaluations per layer that a search must have for the first to change one layer at a time
_MARGIN = 0.1  # of the evaluated range: how far the reference point lies beyond its worst
_COST_ERROR = 1e-3  # of its range; what counts explain better than that is a cost


class FrontSampler(InformedSampler):
    """Optuna sampler for two or three objectives over the layers of a search space.

    The study's parameters must all be categorical over whole numbers, one a layer, with names in the layers' order.

    Args:
        seed: Of everything random.
        draws: Posterior samples per proposal.
        startup: Evaluations, random ones if need be, before anything is learned.

    Raises:
        ValueError: ``draws`` or ``startup`` is too small.
    """

    def __init__(self, seed: int | None = None, draws: int = 1, startup: int = 3) -> None:
        if draws < 0 or startup < 2:
            raise ValueError(f"draws is {draws} and startup {startup}; they must be at least 0 and 2")
        self._rng, self._random = np.random.default_rng(seed), RandomSampler(seed=seed)
        self._draws, self._startup = draws, startup

    def reseed_rng(self) -> None:
        self._rng = np.random.default_rng()
        self._random.reseed_rng()

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random; only before any trial is finished."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The vector of largest expected improvement, or a random new one while there is too little to learn from."""
        names = sorted(search_space)
        if not names:
            return {}
        layers = Layers.of([search_space[name] for name in names])
        signs = np.array([-1.0 if way == StudyDirection.MAXIMIZE else 1.0 for way in study.directions])
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        others = [other for other in others if all(name in other.params for name in names)]
        vectors = layers.choices([other.params[name] for name in names] for other in others)
        values = np.array([other.values or [np.nan] * len(signs) for other in others]).reshape(-1, len(signs)) * signs
        known = self.costs
        costs = (lambda chosen: known(layers.levels_K[chosen]) * signs) if known else None
        with _libraries().limit(limits=1, user_api="blas"):  # more threads only hinder with such small matrices
            chosen = self._proposal(layers, vectors, values, costs)
        return dict(zip(names, layers.levels_K[chosen].tolist(), strict=True))

    def _proposal(self, layers: Layers, vectors_NL: Ints, values_NO: Floats, costs: Costs | None) -> Ints:
        """The choices of the vector to evaluate next.

        Args:
            layers: The space.
            vectors_NL: The choices of the finished and running trials.
            values_NO: Their objectives, to be minimised; NaN for running ones.
            costs: `Costs` in these terms.
        """
        running = np.isnan(values_NO).any(axis=1)
        new = self._filter(layers, vectors_NL)
        enough = _DESIGN * len(layers.allowed_LK)
        if len(vectors_NL) < enough <= (self.evaluations or enough) and len(design := new(layers.one_at_a_time())):
            return np.asarray(self._rng.choice(design))
        evaluated, values = vectors_NL[~running], values_NO[~running]
        enough = self._startup if costs else len(layers.levels_K) + 2
        if len(evaluated) < max(enough, 2):
            return self._random_vector(layers, new)
        forecast = _Forecast(layers, evaluated, values, costs or learned_costs(layers, evaluated, values))
        candidates = new(self._candidates(layers, forecast))
        if not len(candidates):
            return self._random_vector(layers, new)
        expected = forecast.points(candidates)
        points = np.concatenate((forecast.points(evaluated, values), forecast.points(vectors_NL[running])))
        worst = points.max(axis=0)
        if costs:  # limits may rule out the vectors that would have shown how much others cost
            worst[1:] = np.maximum(worst[1:], expected[:, 1:].max(axis=0))
        reference = worst + _MARGIN * (worst - points.min(axis=0))
        front = points[moocore.is_nondominated(points)]

        def improvements(deviations_N: Floats) -> Floats:
            return expected_hypervolume_improvement(expected[:, 0], deviations_N, expected[:, 1:], front, reference)

        if len(candidates) > _CONSIDERED:
            typical = forecast.deviations(candidates[:: len(candidates) // 20]).mean()
            best = np.argsort(-improvements(np.full(len(candidates), typical)), kind="stable")[:_CONSIDERED]
            candidates, expected = candidates[best], expected[best]
        return np.asarray(candidates[improvements(forecast.deviations(candidates)).argmax()])

    def _candidates(self, layers: Layers, forecast: "_Forecast") -> Ints:
        """All vectors of a small space; of a large one the best for all counts, by the model's mean and its samples."""
        if layers.size <= _ENUMERATED:
            return layers.all_vectors()
        forbidden = np.where(layers.allowed_LK, 0.0, np.inf)
        losses: list[tuple[Floats, Floats | None]] = [] if forecast.models else [(forbidden, None)]
        for model in forecast.models.values():
            samples = [model.draw(self._rng) for _ in range(self._draws)]
            losses += [(forbidden + loss.penalties_LK, loss.couplings_MKK) for loss in (model.mean(), *samples)]
        return np.concatenate([best_vectors(*loss, layers.levels_K) for loss in losses])

    def _filter(self, layers: Layers, vectors_NL: Ints) -> Callable[[Ints], Ints]:
        """Keeps of some vectors those that may be proposed, each once."""
        taken = set(_keys(np.concatenate((vectors_NL, layers.choices(self.taken)))))

        def new(vectors: Ints) -> Ints:
            places = {key: place for place, key in enumerate(_keys(vectors)) if key not in taken}
            kept = vectors[list(places.values())]
            return kept[self.permitted(layers.levels_K[kept])] if self.permitted else kept

        return new

    def _random_vector(self, layers: Layers, new: Callable[[Ints], Ints]) -> Ints:
        for _ in range(20):
            if len(found := new(layers.random(50, self._rng))):
                return np.asarray(found[0])
        return np.asarray(layers.random(1, self._rng)[0])  # whoever asked must cope with a space that is used up


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _keys(vectors_NL: Ints) -> list[bytes]:
    """What a vector's choices are called in a set."""
    rows = np.ascontiguousarray(vectors_NL, dtype=np.int8)
    return rows.view(f"V{rows.shape[1]}").ravel().tolist() if len(rows) else []


class _Forecast:
    """What is expected of vectors that are not evaluated: models of the losses, and costs.

    The first column of its points is the objective whose uncertainty counts: the first loss, or if there is none the
    first cost, which has none.
    """

    def __init__(self, layers: Layers, evaluated_NL: Ints, values_NO: Floats, costs: Costs) -> None:
        self._costs = costs
        losses = np.flatnonzero(np.isnan(costs(evaluated_NL[:1])[0]))
        self.models = {int(loss): LossModel(evaluated_NL, values_NO[:, loss], len(layers.levels_K)) for loss in losses}
        first = int(losses[0]) if len(losses) else 0
        self._order = [first, *(objective for objective in range(values_NO.shape[1]) if objective != first)]

    def points(self, vectors_NL: Ints, values_NO: Floats | None = None) -> Floats:
        """Expected objectives of vectors, or given ones, in the order described above."""
        if values_NO is None:
            values_NO = self._costs(vectors_NL) if len(vectors_NL) else np.empty((0, len(self._order)))
            for loss, model in self.models.items():
                values_NO[:, loss] = model.means(vectors_NL)
        return values_NO[:, self._order]

    def deviations(self, vectors_NL: Ints) -> Floats:
        """Uncertainty of the first objective."""
        model = self.models.get(self._order[0])
        return model.deviations(vectors_NL) if model else np.zeros(len(vectors_NL))


def learned_costs(layers: Layers, vectors_NL: Ints, values_NO: Floats) -> Costs:
    """Costs as the evaluated vectors show them: objectives that, or whose inverse, is linear in counts.

    Latency and bytes are linear in counts, throughput is the inverse of something that is.

    Args:
        layers: The space.
        vectors_NL: Evaluated vectors, as choices; more of them than there are choices.
        values_NO: Their objectives.
    """
    choices = np.arange(len(layers.levels_K))

    def counts(vectors: Ints) -> Floats:
        return np.asarray((vectors[:, :, None] == choices).sum(axis=1), dtype=float)

    fits: list[Costs | None] = []
    for values in values_NO.T:
        found = None
        for power in (1, -1) if (values != 0).all() else (1,):
            slopes = np.linalg.lstsq(counts(vectors_NL), values**power, rcond=None)[0]

            def cost(vectors: Ints, slopes: Floats = slopes, power: int = power) -> Floats:
                return np.asarray((counts(vectors) @ slopes) ** power)

            if np.abs(cost(vectors_NL) - values).max() <= _COST_ERROR * np.ptp(values):
                found = found or cost
        fits.append(found)

    def costs(vectors: Ints) -> Floats:
        unknown = np.full(len(vectors), np.nan)
        return np.stack([fit(vectors) if fit else unknown for fit in fits], axis=1)

    return costs
