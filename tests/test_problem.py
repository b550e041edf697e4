"""Limits on costs: which vectors keep them, how many there are, and what is said where none can."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import UserError
from nas.search import Objectives, Problem
from nas.search.problem import ways_by_counts
from nas.space import SearchSpace, Vector, load_space

TWO = Objectives(("loss_nats", "decode_ms"))
CHOICES = st.lists(st.sets(st.sampled_from([1, 2, 4, 8]), min_size=1), min_size=4, max_size=4)


def space_of(choices: list[set[int]]) -> SearchSpace:
    """A four-layer space."""
    shape = replace(load_space("tiny").shape, num_hidden_layers=len(choices), num_attention_heads=8)
    return SearchSpace("drawn", shape, tuple(tuple(sorted(allowed)) for allowed in choices))


def costs(vector: Vector) -> dict[str, float]:
    """Metrics that depend on counts alone."""
    return {"decode_ms": 1 + 0.5 * sum(vector), "tokens_per_s": 100 / sum(vector), "memory_gib": float(vector.count(4))}


@given(CHOICES)
def test_the_ways_of_each_counts_are_those_of_brute_force(choices: list[set[int]]) -> None:
    space = space_of(choices)
    wanted = Counter(tuple(sorted(vector)) for vector in itertools.product(*space.choices))
    assert ways_by_counts(space) == wanted


@given(CHOICES, st.floats(1, 15), st.floats(3, 30))
def test_the_vectors_that_keep_all_limits_are_those_of_brute_force(
    choices: list[set[int]], most: float, least: float
) -> None:
    space = space_of(choices)
    kept = {
        vector
        for vector in itertools.product(*space.choices)
        if costs(vector)["decode_ms"] <= most and costs(vector)["tokens_per_s"] >= least
    }
    limits = {"max_decode_ms": most, "min_tokens_per_s": least, "max_memory_gib": None}
    if not kept:
        with pytest.raises(UserError, match=r"constraints\.m.* is .*, but the closest .*; change it"):
            Problem(space, TWO, costs, limits)
        return
    problem = Problem(space, TWO, costs, limits)
    assert {vector for vector in itertools.product(*space.choices) if problem.keeps_limits(vector)} == kept
    assert problem.size == len(kept)


def test_without_limits_all_vectors_are_kept_and_nothing_is_predicted() -> None:
    space = load_space("decilm-6b")

    def fail(_: Vector) -> dict[str, float]:
        raise AssertionError("predicted")

    problem = Problem(space, TWO, fail, {"max_decode_ms": None})
    assert problem.keeps_limits(space.largest)
    assert problem.size == 3**32


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_decode_ms": 2.9}, "max_decode_ms is 2.9, but the closest that a vector of drawn comes is 3;"),
        ({"min_tokens_per_s": 26}, "min_tokens_per_s is 26, but the closest that a vector of drawn comes is 25;"),
        (
            {"max_decode_ms": 4.0, "min_tokens_per_s": 20, "max_memory_gib": -1},
            "closest that a vector of drawn comes with max_decode_ms 4 and min_tokens_per_s 20 is 0;",
        ),
    ],
)
def test_an_impossible_limit_is_named_with_the_closest_that_can_be_reached(
    limits: dict[str, float], words: str
) -> None:
    with pytest.raises(UserError) as refused:
        Problem(space_of([{1, 2, 4}] * 4), TWO, costs, limits)
    assert str(refused.value).startswith("constraints.")
    assert words in str(refused.value)


@given(st.floats(1.0, 1e6))
def test_a_limit_changed_to_the_closest_value_that_was_said_is_possible(scale: float) -> None:
    space = space_of([{1, 2, 4}] * 4)

    def scaled(vector: Vector) -> dict[str, float]:
        return {key: value * scale / 3 for key, value in costs(vector).items()}

    for key, bound in (("max_decode_ms", 0.0), ("min_tokens_per_s", 1e9)):
        with pytest.raises(UserError) as refused:
            Problem(space, TWO, scaled, {key: bound})
        said = float(str(refused.value).split(" is ")[-1].split(";")[0])
        assert Problem(space, TWO, scaled, {key: said}).size == 1
