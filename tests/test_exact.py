"""The exact reference against brute force."""

import doctest
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.search import exact
from nas.search.exact import best_by_counts, best_by_weights

FINITE = st.floats(-3, 3)
PENALTIES = st.one_of(FINITE, FINITE, FINITE, st.just(np.inf))  # a layer may lack a choice


@st.composite
def losses(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None]:
    """Penalties of up to five layers with up to four choices, and couplings or none."""
    layers, choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    own = draw(st.lists(PENALTIES, min_size=layers * choices, max_size=layers * choices))
    size = (layers - 1) * choices**2
    coupled = draw(st.one_of(st.none(), st.lists(FINITE, min_size=size, max_size=size)))
    couplings = None if coupled is None else np.array(coupled).reshape(layers - 1, choices, choices)
    return np.array(own).reshape(layers, choices), couplings


def loss_of(vector: Sequence[int], penalties: np.ndarray, couplings: np.ndarray | None) -> float:
    """The loss as the docstring defines it."""
    pairs = itertools.pairwise(vector)
    coupled = 0.0 if couplings is None else sum(couplings[at][pair] for at, pair in enumerate(pairs))
    return float(sum(penalties[layer, choice] for layer, choice in enumerate(vector)) + coupled)


@settings(deadline=None)
@given(losses(), st.booleans(), st.integers(0, 3))
def test_each_total_has_its_best_vector_and_no_other_total_is_there(
    loss: tuple[np.ndarray, np.ndarray | None], by_counts: bool, step: int
) -> None:
    penalties, couplings = loss
    layers, choices = penalties.shape
    weights = np.eye(choices, dtype=int)[:, 1:] if by_counts else (1 + step * np.arange(choices))[:, None]
    found = best_by_counts(penalties, couplings) if by_counts else best_by_weights(penalties, couplings, weights)

    wanted: dict[tuple[int, ...], float] = {}
    for vector in itertools.product(range(choices), repeat=layers):
        value = loss_of(vector, penalties, couplings)
        total = tuple(weights[list(vector)].sum(axis=0).tolist())
        if np.isfinite(value):
            wanted[total] = min(value, wanted.get(total, np.inf))
    got = {
        tuple(weights[vector].sum(axis=0).tolist()): value for vector, value in zip(*vars(found).values(), strict=True)
    }
    assert got == pytest.approx(wanted)
    for vector, value in zip(found.vectors_TL, found.losses_T, strict=True):
        assert loss_of(vector, penalties, couplings) == pytest.approx(value)


def test_all_counts_of_a_published_depth_are_reached() -> None:
    best = best_by_counts(np.random.default_rng(0).normal(size=(32, 3)))
    assert len(best.losses_T) == 561
    assert len({tuple(np.bincount(vector, minlength=3)) for vector in best.vectors_TL}) == 561


def test_the_worked_example_is_right() -> None:
    assert doctest.testmod(exact).failed == 0
    assert doctest.testmod(exact).attempted == 2


@pytest.mark.parametrize(
    ("penalties", "couplings", "words"),
    [
        (np.zeros((3, 2)), np.zeros((3, 2, 2)), r"\(3, 2, 2\), but \(2, 2, 2\)"),
        (np.array([[np.nan]]), None, "NaN"),
        (np.zeros((2, 2)), np.full((1, 2, 2), np.nan), "NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(penalties: np.ndarray, couplings: np.ndarray | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        best_by_counts(penalties, couplings)
