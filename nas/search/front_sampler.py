"""FrontSampler: learns what each layer loses, solves exactly for the best vectors, and asks for the most promising one.

The first vectors change one layer at a time: each layer once to its smallest choice, all others at their largest. Then
`nas.search.loss_model` learns from all finished trials what each layer adds to the loss, and what a sum misses;
`nas.search.exact` finds the best vector for every combination of counts, under that sum's mean and under a posterior
sample. Of those that are new, the one of largest expected hypervolume improvement is proposed, by the whole model and
by costs that depend on counts alone. Where `FrontSampler.costs` does not tell these, the trials show which ones are.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import moocore
import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from nas.hardware import cpu_threads
from nas.search.exact import Floats, Ints
from nas.search.loss_model import LossModel
from nas.search.sampler import COUNTED, Costs, InformedSampler, Layers

_STARTUP = 3  # evaluations, random ones if need be, before anything is learned; without costs more are needed
_ENUMERATED = 10_000  # vectors; a space no larger is looked at as a whole
_CONSIDERED = 100  # candidates whose own uncertainty is worked out
_DESIGN = 2  # evaluations per layer: searches with fewer do not begin with one layer at a time
_MARGIN = 0.1  # of the evaluated range: how far the reference point lies beyond its worst
_COST_ERROR = 1e-3  # of its range; what counts explain better than that is a cost


class FrontSampler(InformedSampler, RandomSampler):  # random before any trial is finished
    """Optuna sampler for two or three objectives over the layers of a search space.

    The study's parameters must all be categorical over whole numbers, one per layer, with names in the layers' order.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(seed=seed)
        self._random = np.random.default_rng(seed)
        self.promised: float | None = None  # what the last proposal is expected to add to the front's hypervolume

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters of the last finished trial."""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return dict(finished[-1].distributions) if finished else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The vector of largest expected improvement, or a random new one while there is too little to learn from."""
        names = sorted(search_space, key=lambda name: (len(name), name))  # layer_100 comes after layer_99
        if not names:
            return {}
        layers = Layers.of([search_space[name] for name in names])
        signs = np.array([-1.0 if way == StudyDirection.MAXIMIZE else 1.0 for way in study.directions])
        others = study.get_trials(deepcopy=False, states=COUNTED)
        others = [other for other in others if other.params.keys() >= search_space.keys()]
        vectors = layers.choices([other.params[name] for name in names] for other in others)
        values = np.array([other.values or [np.nan] * len(signs) for other in others]).reshape(-1, len(signs)) * signs
        known = self.costs
        costs = (lambda chosen: known(layers.levels_K[chosen]) * signs) if known else None
        self.promised = None
        with cpu_threads(1):  # the model's matrices are small, and on many cores more time goes into waiting
            chosen = self._proposal(layers, vectors, values, costs)
        return dict(zip(names, layers.levels_K[chosen].tolist(), strict=True))

    def _proposal(self, layers: Layers, vectors_NL: Ints, values_NO: Floats, costs: Costs | None) -> Ints:
        """The choices of the vector to evaluate next, from those of the finished and running trials.

        All objectives are to be minimised; they are NaN for running trials. ``costs`` takes choices here.
        """
        taken = {*map(tuple, vectors_NL.tolist()), *map(tuple, layers.choices(self.taken).tolist())}

        def new(some_NL: Ints) -> Ints:
            """Those of some vectors that may be proposed, each once."""
            places = {vector: place for place, vector in enumerate(map(tuple, some_NL.tolist())) if vector not in taken}
            kept = some_NL[list(places.values())]
            return kept[self.permitted(layers.levels_K[kept])] if self.permitted else kept

        enough = _DESIGN * len(layers.allowed_LK)
        begins = len(vectors_NL) < enough <= (self.evaluations or enough)
        if begins and len(design := new(layers.one_at_a_time())):
            return np.asarray(self._random.choice(design))
        finished = ~np.isnan(values_NO).any(axis=1)
        evaluated, values = vectors_NL[finished], values_NO[finished]
        if len(evaluated) >= (_STARTUP if costs else len(layers.levels_K) + 2):
            costs_of = costs or learned_costs(layers, evaluated, values)
            losses = np.flatnonzero(np.isnan(costs_of(evaluated[:1])[0])).tolist()
            models = {column: LossModel(evaluated, values[:, column], len(layers.levels_K)) for column in losses}
            if len(candidates := new(self._candidates(layers, models.values()))):
                best, self.promised = _most_promising(
                    candidates, vectors_NL, values_NO, models, costs_of, costs_known=bool(costs)
                )
                return best
        for _ in range(20):
            if len(found := new(drawn := layers.random(50, self._random))):
                return np.asarray(found[0])
        return np.asarray(drawn[0])  # whoever asked must cope with a space that is used up

    def _candidates(self, layers: Layers, models: Iterable[LossModel]) -> Ints:
        """All vectors of a small space; of a large one the best for all counts, by the model's mean and a sample."""
        if layers.size <= _ENUMERATED:
            return layers.all()
        losses = [loss for model in models for loss in (model.mean(), model.draw(self._random))]
        best = [layers.best(loss.penalties_LK, loss.couplings_MKK) for loss in losses]
        return np.concatenate(best or [layers.best(0.0)])


def _most_promising(
    candidates: Ints,
    vectors_NL: Ints,
    values_NO: Floats,
    models: Mapping[int, LossModel],
    costs_of: Costs,
    costs_known: bool,
) -> tuple[Ints, float]:
    """The candidate of largest expected improvement, and that as a share of the front's hypervolume.

    Works out the uncertainty of those alone that may be it.
    """
    uncertain = min(models, default=0)  # the objective whose uncertainty counts; a cost has none
    order = sorted(range(values_NO.shape[1]), key=lambda objective: objective != uncertain)

    def expected(vectors: Ints) -> Floats:
        objectives = costs_of(vectors)
        for column, model in models.items():
            objectives[:, column] = model.means(vectors)
        return objectives[:, order]

    def deviations(vectors: Ints) -> Floats:
        return models[uncertain].deviations(vectors) if models else np.zeros(len(vectors))

    promised = expected(candidates)
    points = np.where(np.isnan(values_NO).any(axis=1, keepdims=True), expected(vectors_NL), values_NO[:, order])
    worst = points.max(axis=0)
    if costs_known:  # limits may rule out the vectors that would have shown how much others cost
        worst[1:] = np.maximum(worst[1:], promised[:, 1:].max(axis=0))
    reference = worst + _MARGIN * (worst - points.min(axis=0))
    front = points[moocore.is_nondominated(points)]
    if len(candidates) > _CONSIDERED:
        typical = np.full(len(candidates), deviations(candidates[:: len(candidates) // 20]).mean())
        improvements = expected_hypervolume_improvement(promised, typical, front, reference)
        considered = np.argsort(-improvements, kind="stable")[:_CONSIDERED]
        candidates, promised = candidates[considered], promised[considered]
    improvements = expected_hypervolume_improvement(promised, deviations(candidates), front, reference)
    share = improvements.max() / max(moocore.hypervolume(front, ref=reference), 1e-300)  # 0 if all vectors are alike
    return np.asarray(candidates[improvements.argmax()]), float(share)


def learned_costs(layers: Layers, vectors_NL: Ints, values_NO: Floats) -> Costs:
    """Costs as the evaluated vectors, more than there are choices, show them: what is linear in counts, or its inverse.

    Latency and bytes are linear in counts, throughput is the inverse of something that is.
    """

    def counts(vectors: Ints) -> Floats:
        return np.asarray((vectors[:, :, None] == np.arange(len(layers.levels_K))).sum(axis=1), dtype=float)

    fits: dict[int, tuple[Floats, int]] = {}  # slopes and power by objective
    for objective, values in enumerate(values_NO.T):
        for power in (-1, 1) if (values != 0).all() else (1,):
            slopes = np.linalg.lstsq(counts(vectors_NL), values**power, rcond=None)[0]
            if np.abs((counts(vectors_NL) @ slopes) ** power - values).max() <= _COST_ERROR * np.ptp(values):
                fits[objective] = slopes, power  # linear rather than inverse where both fit

    def costs(vectors: Ints) -> Floats:
        known = np.full((len(vectors), values_NO.shape[1]), np.nan)
        for objective, (slopes, power) in fits.items():
            known[:, objective] = (counts(vectors) @ slopes) ** power
        return known

    return costs


def expected_hypervolume_improvement(
    points_NO: Floats, deviations_N: Floats, front_FO: Floats, reference_O: Floats
) -> Floats:
    """How much each candidate, of expected loss and known costs, is expected to add to the hypervolume of the front.

    At loss u a candidate with costs c adds, of the hypervolume of costs, what the front's points with losses up to u
    leave uncovered; the expectation is the integral of that over u, times the probability that the loss is below u. It
    is a step function of u, and the integral of a normal distribution's probability is elementary.

    The first objective is the loss, which is normally distributed, a deviation of 0 being certainty; all are minimised.
    """
    ordered = front_FO[np.argsort(front_FO[:, 0], kind="stable")]
    edges_E = np.concatenate((ordered[:, 0], reference_O[:1]))  # the upper end of each slice of losses
    deviations_N1 = np.maximum(deviations_N, 1e-12)[:, None]
    above_NE = edges_E - points_NO[:, :1]
    z_NE = above_NE / deviations_N1
    below_NE = above_NE * ndtr(z_NE) + deviations_N1 * np.exp(-(z_NE**2) / 2) / np.sqrt(2 * np.pi)  # the integrals
    weights_NE = np.diff(below_NE, axis=1, prepend=0.0)
    return np.asarray((weights_NE * _uncovered(points_NO[:, 1:], ordered[:, 1:], reference_O[1:])).sum(axis=1))


def _uncovered(costs_NC: Floats, front_FC: Floats, reference_C: Floats) -> Floats:
    """The hypervolume that each candidate's costs add to those of the front's first 0, 1, … F points, (N, F + 1)."""
    if costs_NC.shape[1] == 1:
        return np.maximum(0.0, np.minimum.accumulate(np.concatenate((reference_C, front_FC[:, 0]))) - costs_NC)
    different, which = np.unique(costs_NC, axis=0, return_inverse=True)  # vectors of the same counts cost the same
    found = np.empty((len(different), len(front_FC) + 1))
    for points in range(len(front_FC) + 1):
        base = front_FC[:points]
        covered = moocore.hypervolume(base, ref=reference_C) if points else 0.0
        with_each = [moocore.hypervolume(np.vstack((base, costs)), ref=reference_C) for costs in different]
        found[:, points] = np.array(with_each) - covered
    return found[which.ravel()]
