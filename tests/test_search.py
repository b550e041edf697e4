"""The search: against brute force, across samplers, budgets, seeds and restarts."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import moocore
import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import UserError
from nas.metrics import METRICS
from nas.search import Objectives, Problem, Storage, on_front, reference_point, search
from nas.search.pareto import hypervolume_curve, knee
from nas.search.problem import AUTO, Budget, parse_budget
from nas.search.sampler import has_converged
from nas.space import SearchSpace, Vector, format_vector, load_space
from tests.search_problem import SAMPLERS, TWO, additive_loss, costs, problem


@pytest.fixture(scope="module")
def small(micro: SearchSpace) -> SearchSpace:
    """Three layers, 12 vectors."""
    return SearchSpace("small", micro.shape, ((1, 4), (1, 4), (1, 2, 4)), micro.known_vectors)


def six_layers(micro: SearchSpace) -> SearchSpace:
    return SearchSpace("six", replace(micro.shape, num_hidden_layers=6), ((1, 2, 4),) * 6)


def run(
    asked: Problem,
    path: Path,
    budget: Budget,
    sampler: str = "nsga2",
    seed: int = 0,
    loss: Callable[[Vector], float] = additive_loss,
) -> pd.DataFrame:
    path.mkdir(exist_ok=True)
    return search(asked, loss, SAMPLERS[sampler], budget, seed, Storage.file(path / "study.db"))


def test_a_budget_that_ends_before_one_evaluation_is_refused(small: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="before one vector was evaluated; raise it"):
        run(problem(small), tmp_path, Budget(None, 1e-9))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_of_the_whole_space_finds_its_front_with_reference_vectors_first_and_though_it_is_interrupted(
    small: SearchSpace, tmp_path: Path, sampler: str
) -> None:
    seen: list[Vector] = []

    def counted(vector: Vector) -> float:
        seen.append(vector)
        return additive_loss(vector)

    whole = run(problem(small), tmp_path / "whole", Budget(1000), sampler, loss=counted)
    assert len(seen) == len(set(seen)) == small.size
    assert seen[:3] == [(1, 1, 1), (4, 4, 4), (4, 1, 2)]
    assert [format_vector(vector) for vector in seen] == list(whole["vector"])
    points = {v: (additive_loss(v), float(costs(v)["decode_ms"])) for v in seen}
    best = {
        format_vector(v)
        for v, p in points.items()
        if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points.values())
    }
    assert set(whole.loc[whole["on_front"], "vector"]) == best

    for survives in (2, 5):  # among the reference vectors, and later

        def cut(vector: Vector, left: list[int] = [survives]) -> float:  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return additive_loss(vector)

        with pytest.raises(KeyboardInterrupt):
            run(problem(small), tmp_path / "broken", Budget(10), sampler, loss=cut)
    columns = ["vector", "loss_nats", "tokens_per_s"]
    resumed = run(problem(small), tmp_path / "broken", Budget(10), sampler)
    pd.testing.assert_frame_equal(resumed[columns], whole.loc[:9, columns])


def test_seeds_decide_what_is_proposed(small: SearchSpace, tmp_path: Path) -> None:
    vectors = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        vectors.append(list(run(problem(small), tmp_path / name, Budget(7), "random", seed)["vector"]))
    assert vectors[0] == vectors[1]
    assert vectors[0] != vectors[2]


def test_a_budget_in_time_ends_the_search_and_counts_across_restarts(micro: SearchSpace, tmp_path: Path) -> None:
    def slow(vector: Vector) -> float:
        time.sleep(0.3)
        return additive_loss(vector)

    first = run(problem(micro), tmp_path, Budget(None, 1.0), loss=slow)
    assert 2 <= len(first) < micro.size
    again = run(problem(micro), tmp_path, Budget(None, 1.0), loss=slow)
    assert len(again) <= len(first) + 1  # what the first spent is counted, but for the time between evaluations


def test_an_automatic_budget_ends_when_little_is_expected_and_does_so_again_after_a_break(
    micro: SearchSpace, tmp_path: Path
) -> None:
    weights, asked = (6, 1, 4, 2, 8, 3), problem(six_layers(micro))

    def loss(vector: Vector) -> float:
        return 3.0 + sum(weight * (4 - groups) for weight, groups in zip(weights, vector, strict=True)) / 1000

    def dies(vector: Vector) -> float:
        if len(seen) == 25:
            raise KeyboardInterrupt
        seen.append(vector)
        return loss(vector)

    whole = run(asked, tmp_path / "whole", AUTO, "front", loss=loss)
    assert "none of the last 10 proposals promised" in whole.attrs["stopped"]
    assert 25 < len(whole) < 100
    every = [(loss(vector), 1 / float(costs(vector)["tokens_per_s"])) for vector in asked.vectors()]
    found = whole.assign(cost=1 / whole["tokens_per_s"])[["loss_nats", "cost"]].to_numpy()
    reference = 1.01 * np.max(every, axis=0)
    shares = [moocore.hypervolume(np.array(points), ref=reference) for points in (found, every)]
    assert shares[0] / shares[1] > 0.99
    seen: list[Vector] = []
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "broken", AUTO, "front", loss=dies)
    pd.testing.assert_frame_equal(run(asked, tmp_path / "broken", AUTO, "front", loss=loss), whole)


@pytest.mark.parametrize(
    ("promised", "converged"),
    [([1e-5] * 9, False), ([1e-5] * 10, True), ([1e-5] * 9 + [1e-3], False), ([1e-5] * 5 + [None] + [1e-5] * 9, False)],
)
def test_a_search_has_converged_when_none_of_the_last_proposals_promised_much(
    promised: list[float | None], converged: bool
) -> None:
    assert has_converged(promised) is converged


def test_without_a_budget_all_that_keeps_the_limits_comes_in_lexicographic_order(
    micro: SearchSpace, tmp_path: Path
) -> None:
    asked = problem(micro, limits={"max_decode_ms": 1.6})
    trials = run(asked, tmp_path, Budget(), "random")
    references = sum(map(asked.keeps_limits, micro.reference_vectors().values()))
    after_references = trials["vector"].tolist()[references:]
    assert after_references == sorted(after_references)
    assert len(trials) == asked.size > references + 4


def test_three_objectives_are_searched_together(micro: SearchSpace, tmp_path: Path) -> None:
    three = Objectives(("loss_nats", "decode_ms", "kv_bytes_per_token"))
    trials = run(problem(micro, objectives=three), tmp_path, Budget(7), "tpe")
    assert len(trials) == 7
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert {trial.user_attrs["vector"] for trial in study.best_trials} >= set(trials.loc[trials["on_front"], "vector"])


def test_a_corrupt_study_is_one_sentence(micro: SearchSpace, tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="cannot be read or written"):
        run(problem(micro), tmp_path, Budget(5))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_the_front_is_what_no_other_point_dominates(values: list[tuple[int, int]]) -> None:
    frame = pd.DataFrame(values, columns=["loss_nats", "tokens_per_s"])
    flags = on_front(frame, TWO)
    best = {(a, b) for a, b in values if not any(x <= a and y >= b and (x, y) != (a, b) for x, y in values)}
    assert {values[index] for index in np.flatnonzero(flags)} == best
    assert flags.sum() == len(best)  # equal points count once


def test_the_hypervolume_curve_adds_the_new_rectangles() -> None:
    trials = pd.DataFrame({"loss_nats": [3.0, 2.0, 2.5, 9.0], "tokens_per_s": [4.0, 1.0, 3.0, 9.0]})
    curve = hypervolume_curve(trials, TWO, np.array([4.0, 0.0]))
    # loss 3 × speed 4 below the reference (4, 0); then (2, 1) adds 1, (2.5, 3) adds 1, (9, 9) lies outside
    assert curve.tolist() == [4.0, 5.0, 6.0, 6.0]


def test_the_reference_point_lies_a_tenth_of_the_range_beyond_the_worst() -> None:
    reference_vectors = pd.DataFrame({"loss_nats": [3.0, 2.0], "tokens_per_s": [100.0, 200.0]})
    assert reference_point(reference_vectors, TWO) == pytest.approx([3.1, 90.0])


def test_the_knee_is_nearest_to_the_ideal_point() -> None:
    front = pd.DataFrame({"loss_nats": [1.0, 1.1, 2.0], "tokens_per_s": [10.0, 90.0, 100.0]})
    assert knee(front, TWO) == 1


@pytest.mark.parametrize("names", [["loss_nats"], ["loss_nats"] * 2, ["loss_nats", "speed"], list(METRICS)[:4]])
def test_objectives_are_two_or_three_different_metrics(names: list[str]) -> None:
    with pytest.raises(UserError, match="two or three"):
        Objectives(tuple(names))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("all", Budget()),
        ("auto", Budget(auto=True)),
        ("200", Budget(200, None)),
        ("90s", Budget(None, 90)),
        ("30m", Budget(None, 1800)),
        ("0.5h", Budget(None, 1800)),
    ],
)
def test_budgets_are_evaluations_or_durations(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@settings(max_examples=50)
@given(st.text(max_size=6))
def test_any_other_budget_is_refused_or_positive(text: str) -> None:
    try:
        budget = parse_budget(text)
    except UserError as error:
        assert "budget" in str(error)
    else:
        assert (budget.evaluations or budget.seconds or 0) > 0


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "front"])
def test_no_vector_is_evaluated_that_breaks_a_limit(micro: SearchSpace, tmp_path: Path, sampler: str) -> None:
    limits = {"max_decode_ms": 1.6, "min_tokens_per_s": 500.0, "max_kv_bytes_per_token": 500}
    trials = run(problem(micro, limits=limits), tmp_path, Budget(), sampler)
    kept = {
        format_vector(vector)
        for vector in itertools.product(*micro.choices)
        if float(costs(vector)["decode_ms"]) <= 1.6 and float(costs(vector)["kv_bytes_per_token"]) <= 500
    }
    assert 5 < len(kept) < micro.size
    assert set(trials["vector"]) == kept
    assert len(trials) == len(kept)


@pytest.mark.parametrize("sampler", ["random", "front"])
def test_few_vectors_among_many_are_found_where_limits_leave_no_others(tmp_path: Path, sampler: str) -> None:
    space = load_space("decilm-6b")
    asked = problem(space, limits={"max_kv_bytes_per_token": 64 * 33})  # all but the ones and a single 2
    trials = run(asked, tmp_path, Budget(8), sampler)
    assert trials["vector"].nunique() == len(trials) == 8
    assert max(trials["kv_bytes_per_token"]) == 64 * 33


@pytest.mark.parametrize("limits", [{"max_decode_ms": 2.3}, {}])
def test_the_front_within_limits_is_found_though_they_rule_out_reference_vectors(
    micro: SearchSpace, tmp_path: Path, limits: dict[str, float]
) -> None:
    asked = problem(six_layers(micro), limits=limits)
    trials = run(asked, tmp_path, Budget(30), "front")
    everything = pd.DataFrame([{**costs(vector), "loss_nats": additive_loss(vector)} for vector in asked.vectors()])
    assert len(everything) > 300
    reference = reference_point(everything, TWO)
    best = everything[on_front(everything, TWO)]
    found, most = (hypervolume_curve(table, TWO, reference)[-1] for table in (trials, best))
    assert found > 0.99 * most
