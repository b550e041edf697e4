"""Training: which vectors a step runs, the learning rate's schedule, and the loop on a model with a known optimum."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nas.config import SupernetConfig, TrainConfig
from nas.run import Run
from nas.space import SearchSpace, load_space
from nas.training import fit
from nas.training.loop import learning_rate_at
from nas.training.recipes import mixed_vectors


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(1, 40))
def test_the_vectors_of_a_step_are_a_function_of_seed_and_step_and_belong_to_the_space(
    seed: int, step: int, batch: int
) -> None:
    space, config = load_space("tiny"), SupernetConfig(seed=seed, batch=batch)
    vectors = mixed_vectors(space, config, step)
    assert vectors == mixed_vectors(space, config, step)
    assert len(vectors) == batch
    for vector in vectors:
        space.check(vector)


def test_the_largest_and_smallest_get_their_shares_and_totals_spread(micro: SearchSpace) -> None:
    config = SupernetConfig(batch=6, largest_share=0.25, smallest_share=0.125)
    vectors = [vector for step in range(4000) for vector in mixed_vectors(micro, config, step)]
    free = [
        vector
        for step in range(4000)
        for vector in mixed_vectors(micro, SupernetConfig(batch=6, largest_share=0, smallest_share=0), step)
    ]
    for wanted, vector in ((0.25, micro.largest), (0.125, micro.smallest)):
        by_chance = (1 - 0.375) * free.count(vector) / len(free)
        assert vectors.count(vector) / len(vectors) == pytest.approx(wanted + by_chance, abs=0.01)
    odds = 1 / 3**3  # of either end, were every layer drawn with equal odds
    assert free.count(micro.largest) / len(free) > 2 * odds
    assert free.count(micro.smallest) / len(free) > 2 * odds


def test_a_layer_with_fewer_choices_draws_among_its_own() -> None:
    space = SearchSpace("uneven", load_space("tiny").shape, ((1, 2, 4), (2,), (1, 4), *((1,),) * 5))
    vectors = mixed_vectors(space, SupernetConfig(batch=200), 0)
    drawn = [set(layer) for layer in zip(*vectors, strict=True)]
    assert drawn == [{1, 2, 4}, {2}, {1, 4}, *[{1}] * 5]


def test_the_learning_rate_climbs_to_its_peak_and_falls_to_its_final_share() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_share=0.2, final_share=0.1)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[20] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    middle = rates[20 + (99 - 20) // 2]
    assert middle == pytest.approx(0.55, abs=0.02)  # half way between peak and end


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_a_few_steps_has_a_learning_rate_too(steps: int) -> None:
    rates = [learning_rate_at(step, TrainConfig(steps=steps, learning_rate=1.0)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_the_loop_finds_a_known_optimum_and_returns_the_last_validation(tmp_path: Path) -> None:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.zeros(3))

    target, model = torch.tensor([1.0, -2.0, 0.5]), Point()

    def validate() -> dict[str, float]:
        assert not model.training
        return {"distance": float((model.at - target).norm())}

    config = TrainConfig(steps=400, learning_rate=0.1, clip_norm=1e9, validate_every=100, log_every=50)
    last = fit(model, lambda _: ((model.at - target) ** 2).sum(), config, Run(tmp_path), validate)
    assert last["distance"] < 0.05
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "distance" in line] == [100, 200, 300, 400]
    losses = [line["loss_nats"] for line in lines if "loss_nats" in line]
    assert losses[0] > 100 * losses[-1]
    assert np.isfinite([line["gradient_norm"] for line in lines if "gradient_norm" in line]).all()
