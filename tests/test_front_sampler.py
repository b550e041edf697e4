"""The model of losses, the expected improvement, and the sampler that is made of both."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import moocore
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from nas.search import sampler as sampler_module
from nas.search.exact import best_by_counts
from nas.search.front_sampler import FrontSampler, expected_hypervolume_improvement, learned_costs
from nas.search.loss_model import LayerLosses, LossModel
from nas.search.sampler import Layers

optuna.logging.set_verbosity(optuna.logging.ERROR)
Vector = tuple[int, ...]
LAYERS, CHOICES = 12, 3


def truth(seed: int, coupling: float = 0.0, layers: int = LAYERS) -> LayerLosses:
    """A loss in which fewer groups are worse, layers differ, and neighbours may be coupled."""
    rng = np.random.default_rng(seed)
    ones = rng.gamma(2.0, 0.01, layers)
    penalties = np.stack((ones, ones * rng.uniform(0.3, 0.7, layers), np.zeros(layers)), axis=1)
    return LayerLosses(3.0, penalties, rng.normal(0.0, coupling, (layers - 1, CHOICES, CHOICES)))


def vectors_of(count: int, seed: int, layers: int = LAYERS) -> np.ndarray:
    """Random vectors, after the uniform ones."""
    uniform = np.arange(CHOICES).repeat(layers).reshape(CHOICES, layers)
    drawn = np.random.default_rng(seed).integers(0, CHOICES, (count - CHOICES, layers))
    return np.concatenate((uniform, drawn))


def test_with_enough_vectors_a_sum_over_layers_is_known_for_all_others() -> None:
    loss, vectors = truth(0), vectors_of(60, seed=1)
    model, others = LossModel(vectors, loss.of(vectors), CHOICES), vectors_of(50, seed=2)
    np.testing.assert_allclose(model.means(others), loss.of(others), atol=1e-5)
    assert model.deviations(others).max() < 1e-3


def test_couplings_of_neighbours_are_learned_too() -> None:
    loss, vectors, others = truth(0, coupling=0.01), vectors_of(150, seed=1), vectors_of(50, seed=2)
    model = LossModel(vectors, loss.of(vectors), CHOICES)
    np.testing.assert_allclose(model.means(others), loss.of(others), atol=2e-3)
    assert np.ptp(loss.of(others)) > 0.05


def errors(loss: Callable[[np.ndarray], np.ndarray], vectors: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Mean absolute errors of forecasts of other vectors: the model's, and those of a sum fitted by least squares."""

    def features(some: np.ndarray) -> np.ndarray:
        return np.hstack([np.ones((len(some), 1)), *(some == choice for choice in range(CHOICES))])

    linear = features(others) @ np.linalg.lstsq(features(vectors), loss(vectors), rcond=None)[0]
    means = LossModel(vectors, loss(vectors), CHOICES).means(others)
    return float(np.abs(means - loss(others)).mean()), float(np.abs(linear - loss(others)).mean())


@pytest.mark.parametrize("link", [lambda sums: 1 - np.exp(-20 * sums), lambda sums: sums**3])
def test_a_monotone_function_of_a_sum_is_found_out(link: Callable[[Any], Any]) -> None:
    loss, vectors, others = truth(0), vectors_of(100, seed=1), vectors_of(50, seed=2)
    ours, linear = errors(lambda some: link(loss.of(some) - 3.0), vectors, others)
    assert ours < 0.1 * linear
    model = LossModel(vectors, link(loss.of(vectors) - 3.0), CHOICES)
    assert np.corrcoef(model.mean().of(others), loss.of(others))[0, 1] > 0.999  # the sum itself


def test_layers_that_matter_only_together_are_forecast_better_than_by_a_sum() -> None:
    found = []
    for seed in range(3):
        blocks = np.random.default_rng(seed).permutation(LAYERS).reshape(3, 4)

        def loss(some: np.ndarray, blocks: np.ndarray = blocks) -> np.ndarray:
            return np.asarray(np.maximum((2 - some[:, blocks]).sum(axis=2) - 3, 0).sum(axis=1), dtype=float)

        found.append(errors(loss, vectors_of(150, seed), vectors_of(50, seed + 1000)))
    ours, linear = np.mean(found, axis=0)
    assert ours < 0.8 * linear


def test_before_much_is_known_fewer_groups_are_worse_in_every_layer() -> None:
    loss, vectors = truth(0), vectors_of(3, seed=0)
    penalties = LossModel(vectors, loss.of(vectors), CHOICES).mean().penalties_LK
    assert (np.diff(penalties, axis=1) < 0).all()
    np.testing.assert_allclose(penalties, np.broadcast_to(penalties[0], penalties.shape), rtol=0.2)


@pytest.mark.parametrize("count", [8, 40])
def test_the_uncertainty_is_as_large_as_the_errors(count: int) -> None:
    scores = []
    for seed in range(20):
        loss, vectors, others = truth(seed, coupling=0.003), vectors_of(count, seed), vectors_of(30, seed + 1000)[3:]
        model = LossModel(vectors, loss.of(vectors), CHOICES)
        scores += ((model.means(others) - loss.of(others)) / model.deviations(others)).tolist()
    assert 0.7 < np.std(scores) < 1.4
    assert np.mean(np.abs(scores) < 2) > 0.85


def test_draws_of_the_sum_scatter_about_its_mean_less_than_losses_do() -> None:
    loss, vectors, others = truth(3, coupling=0.003), vectors_of(15, seed=3), vectors_of(9, seed=4)[3:]
    model = LossModel(vectors, loss.of(vectors), CHOICES)
    rng = np.random.default_rng(0)
    drawn = np.array([model.draw(rng).of(others) for _ in range(4000)])
    slopes = np.ptp(model.means(others)) / np.ptp(model.mean().of(others))  # nearly straight: losses per sum
    spread = drawn.std(axis=0)
    np.testing.assert_allclose(drawn.mean(axis=0), model.mean().of(others), atol=4 * spread.max() / np.sqrt(4000))
    assert (spread * slopes > 0.3 * model.deviations(others)).all()
    assert (spread * slopes < 1.2 * model.deviations(others)).all()  # without residual and noise


POINTS = st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(POINTS, POINTS, st.integers(2, 3))
def test_the_improvement_of_a_certain_loss_is_moocores_hypervolume(
    front: Sequence[tuple[float, ...]], candidates: Sequence[tuple[float, ...]], objectives: int
) -> None:
    points, others = np.array(front)[:, :objectives], np.array(candidates)[:, :objectives]
    points, reference = points[moocore.is_nondominated(points)], np.full(objectives, 1.1)
    improvements = expected_hypervolume_improvement(others, np.zeros(len(others)), points, reference)
    before = moocore.hypervolume(points, ref=reference)
    wanted = [moocore.hypervolume(np.vstack((points, other)), ref=reference) - before for other in others]
    np.testing.assert_allclose(improvements, wanted, atol=1e-9)


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_improvement_of_an_uncertain_loss_is_the_mean_over_it(objectives: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.random((8, objectives))
    points, reference = points[moocore.is_nondominated(points)], np.full(objectives, 1.1)
    costs, mean, deviation = rng.random((1, objectives - 1)), 0.4, 0.2
    losses = rng.normal(mean, deviation, 20_000)
    certain = np.column_stack((losses, np.repeat(costs, 20_000, axis=0)))
    wanted = expected_hypervolume_improvement(certain, np.zeros(20_000), points, reference).mean()
    uncertain = np.column_stack(([mean], costs))
    improvement = expected_hypervolume_improvement(uncertain, np.array([deviation]), points, reference)
    assert improvement[0] == pytest.approx(wanted, rel=0.03)
    assert improvement[0] > 0


# The sampler in a study of its own, told nothing.

Objectives = Callable[[Vector], tuple[float, ...]]


def groups_cost(vector: Vector) -> float:
    """A cost that counts groups."""
    return 5.0 + 0.02 * vector.count(2) + 0.07 * vector.count(4)


def layer_loss(vector: Vector, loss: LayerLosses) -> float:
    """Loss of a vector of 1, 2 and 4 groups."""
    return float(loss.of(np.searchsorted([1, 2, 4], [vector]))[0])


def layers_of(choices: Sequence[Sequence[int]]) -> dict[str, BaseDistribution]:
    """Parameters of a study, one a layer."""
    return {f"layer_{at:02d}": CategoricalDistribution(tuple(allowed)) for at, allowed in enumerate(choices)}


def search(
    choices: Sequence[Sequence[int]],
    objectives: Objectives,
    directions: Sequence[Any],
    budget: int,
    sampler: optuna.samplers.BaseSampler,
    first: Sequence[Vector] = (),
) -> list[Vector]:
    """Asks and tells, some vectors first; returns all in order."""
    study = optuna.create_study(directions=list(directions), sampler=sampler)
    space = layers_of(choices)
    for vector in first:
        study.enqueue_trial(dict(zip(space, vector, strict=True)))
    vectors = []
    for _ in range(budget):
        trial = study.ask(space)
        vectors.append(tuple(trial.params[name] for name in space))
        study.tell(trial, list(objectives(vectors[-1])))
    return vectors


def two(vector: Vector, loss: LayerLosses) -> tuple[float, float]:
    """Loss and cost."""
    return layer_loss(vector, loss), groups_cost(vector)


def best_points(points: Sequence[tuple[float, ...]]) -> set[tuple[float, ...]]:
    """The Pareto front, everything minimised."""
    return {p for p in points if not any(all(a <= b for a, b in zip(q, p, strict=True)) and q != p for q in points)}


def test_a_small_space_is_searched_to_its_front_long_before_it_is_used_up() -> None:
    choices = [(1, 2, 4)] * 6
    objectives = functools.partial(two, loss=truth(1, coupling=0.002, layers=6))
    vectors = search(choices, objectives, ["minimize"] * 2, 80, FrontSampler(seed=0))
    assert len(set(vectors)) == 80
    everything = list(map(objectives, itertools.product(*choices)))
    front, reference = best_points(everything), np.max(everything, axis=0)
    found = moocore.hypervolume(np.array(list(map(objectives, vectors))), ref=reference)
    assert found / moocore.hypervolume(np.array(list(front)), ref=reference) > 0.999


def test_it_learns_a_large_space_that_a_random_search_does_not() -> None:
    loss = truth(0, layers=24)
    objectives = functools.partial(two, loss=loss)
    best = best_by_counts(loss.penalties_LK)
    exact = np.array([objectives(tuple(np.array([1, 2, 4])[vector].tolist())) for vector in best.vectors_TL])
    shares = {}
    for name, sampler in (("front", FrontSampler(seed=0)), ("random", optuna.samplers.RandomSampler(seed=0))):
        vectors = search([(1, 2, 4)] * 24, objectives, ["minimize"] * 2, 75, sampler)
        points = np.array(list(map(objectives, vectors)))
        reference = exact.max(axis=0)
        shares[name] = moocore.hypervolume(points, ref=reference) / moocore.hypervolume(exact, ref=reference)
    assert shares["front"] > 0.97
    assert shares["random"] < 0.7


def test_three_objectives_in_any_direction() -> None:
    loss = truth(2, layers=8)

    def objectives(vector: Vector) -> tuple[float, float, float]:
        return 1e3 / groups_cost(vector), layer_loss(vector, loss), 64.0 * sum(vector)

    directions = ["maximize", "minimize", "minimize"]
    vectors = search([(1, 2, 4)] * 8, objectives, directions, 30, FrontSampler(seed=0))
    assert len(set(vectors)) == 30
    signs = np.array([-1, 1, 1])
    found = np.array(list(map(objectives, vectors))) * signs
    drawn = np.array([objectives(tuple(v)) for v in np.random.default_rng(0).choice([1, 2, 4], (30, 8))]) * signs
    reference = np.maximum(found.max(axis=0), drawn.max(axis=0))
    assert moocore.hypervolume(found, ref=reference) > 1.2 * moocore.hypervolume(drawn, ref=reference)


def test_layers_may_differ_in_their_choices_and_have_many() -> None:
    choices = [(1, 2, 4), (2,), (1, 8), (1, 2, 4, 8, 16), (4, 8)] * 4
    rng = np.random.default_rng(0)
    sensitive = rng.random(len(choices))

    def objectives(vector: Vector) -> tuple[float, float]:
        return float(sum(s / g for s, g in zip(sensitive, vector, strict=True))), float(sum(vector))

    assert sampler_module._CELLS < 21**4  # solved by totals, not by counts
    vectors = search(choices, objectives, ["minimize"] * 2, 40, FrontSampler(seed=0))
    assert len(set(vectors)) == 40
    assert all(groups in allowed for vector in vectors for groups, allowed in zip(vector, choices, strict=True))
    dominated = sum(
        any(a <= c and b <= d and (a, b) != (c, d) for a, b in map(objectives, vectors))
        for c, d in map(objectives, vectors[15:])
    )
    assert dominated < 15


def test_where_costs_are_all_there_is_it_finds_their_front() -> None:
    def objectives(vector: Vector) -> tuple[float, float]:
        return groups_cost(vector), -float(vector.count(2))

    vectors = search([(1, 2, 4)] * 5, objectives, ["minimize"] * 2, 30, FrontSampler(seed=0))
    assert best_points(list(map(objectives, vectors))) == best_points(
        [objectives(vector) for vector in itertools.product((1, 2, 4), repeat=5)]
    )


def test_a_proposal_is_a_function_of_the_seed_and_the_trials() -> None:
    def run(sampler_of: Callable[[int], FrontSampler]) -> list[Vector]:
        study = optuna.create_study(directions=["minimize"] * 2)
        space = layers_of([(1, 2, 4)] * 16)
        loss, vectors = truth(1, layers=16), []
        for number in range(25):
            study.sampler = sampler_of(number)
            trial = study.ask(space)
            vectors.append(tuple(trial.params.values()))
            study.tell(trial, list(two(vectors[-1], loss)))
        return vectors

    first = run(lambda number: FrontSampler(seed=number))
    assert run(lambda number: FrontSampler(seed=number)) == first
    assert run(lambda number: FrontSampler(seed=number + 100)) != first


def test_running_trials_are_not_proposed_again_and_workers_spread() -> None:
    loss, study = truth(1, layers=10), optuna.create_study(directions=["minimize"] * 2, sampler=FrontSampler(seed=0))
    space = layers_of([(1, 2, 4)] * 10)
    for vector in np.array([1, 2, 4])[vectors_of(23, seed=0, layers=10)].tolist():
        params, values = dict(zip(space, vector, strict=True)), list(two(tuple(vector), loss))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=values))
    asked = [tuple(study.ask(space).params.values()) for _ in range(4)]
    assert len(set(asked)) == 4
    assert len({round(groups_cost(vector), 2) for vector in asked}) > 1  # not all of one place of the front


def test_what_is_taken_or_not_permitted_is_not_proposed() -> None:
    loss, space = truth(1, layers=4), [(1, 2, 4)] * 4
    everything = list(itertools.product(*space))
    sampler = FrontSampler(seed=0)
    sampler.taken = set(everything[::2])
    sampler.permitted = lambda groups: groups.sum(axis=1) <= 9
    allowed = [vector for vector in everything[1::2] if sum(vector) <= 9]
    vectors = search(space, functools.partial(two, loss=loss), ["minimize"] * 2, len(allowed), sampler, allowed[:1])
    assert set(vectors) == set(allowed)


def test_layers_keep_their_order_where_there_are_more_than_a_hundred() -> None:
    ones, twos, fours = ((1,) * 100 + (groups, 1) for groups in (1, 2, 4))
    sampler = FrontSampler(seed=0)
    sampler.taken = {twos}
    space = [(1,)] * 100 + [(1, 2, 4), (1,)]
    assert search(space, lambda _: (0.0, 0.0), ["minimize"] * 2, 2, sampler, [ones]) == [ones, fours]


@pytest.mark.parametrize(("evaluations", "alone"), [(None, 6), (12, 6), (11, 0)])
def test_the_first_vectors_change_one_layer_at_a_time_if_there_are_two_evaluations_per_layer(
    evaluations: int | None, alone: int
) -> None:
    space, sampler = [(1, 2, 4)] * 6, FrontSampler(seed=0)
    sampler.evaluations = evaluations
    objectives = functools.partial(two, loss=truth(1, layers=6))
    vectors = search(space, objectives, ["minimize"] * 2, 9, sampler, [(1,) * 6, (2,) * 6, (4,) * 6])
    changed = {vector for vector in vectors[3:] if sorted(vector) == [1, 4, 4, 4, 4, 4]}
    assert len(changed) == alone or (not alone and len(changed) < 6)


def test_known_costs_decide_where_too_little_was_evaluated_to_learn_them() -> None:
    space, first = [(1, 2, 4)] * 6, [(1,) * 6, (2,) * 6, (4,) * 6]
    proposals = []
    for worth in (1, -1):
        sampler = FrontSampler(seed=0)
        sampler.evaluations = 4
        sampler.costs = lambda groups, worth=worth: np.array([[np.nan, worth * sum(row)] for row in groups])
        objectives = functools.partial(two, loss=truth(1, layers=6))
        proposals.append(search(space, objectives, ["minimize"] * 2, 4, sampler, first)[-1])
    sampler = FrontSampler(seed=0)
    sampler.evaluations = 4
    uninformed = search(space, objectives, ["minimize"] * 2, 4, sampler, first)[-1]
    assert len({*proposals, uninformed}) == 3
    assert sum(proposals[1]) > sum(proposals[0])  # where groups save cost, more of them are worth trying


@pytest.mark.parametrize("power", [1, -1])
def test_costs_are_told_from_losses(power: int) -> None:
    layers = Layers.of([CategoricalDistribution((1, 2, 4))] * LAYERS)
    vectors, loss = vectors_of(12, seed=0), truth(0)
    cost = np.array([groups_cost(tuple(row)) for row in layers.levels_K[vectors].tolist()]) ** power
    known = learned_costs(layers, vectors, np.column_stack((loss.of(vectors), cost)))
    others = vectors_of(9, seed=1)
    found = known(others)
    assert np.isnan(found[:, 0]).all()
    wanted = [groups_cost(tuple(row)) ** power for row in layers.levels_K[others].tolist()]
    np.testing.assert_allclose(found[:, 1], wanted, rtol=1e-6)


@pytest.mark.parametrize("distribution", [FloatDistribution(0, 1), CategoricalDistribution(("a", "b"))])
def test_parameters_that_are_no_layers_are_refused(distribution: BaseDistribution) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        Layers.of([distribution])
