"""The loss of vectors: together as alone, shared work done once, nothing evaluated twice."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import quality
from nas.model import Supernet, decoder
from nas.model.sharing import SHARING_RULES
from nas.quality import InheritedLoss, LossMemo, mean_loss, vector_losses
from nas.space import SearchSpace, Vector
from tests.conftest import random_supernet

WINDOWS = torch.randint(320, (5, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=sorted(SHARING_RULES))
def supernet(request: pytest.FixtureRequest, micro: SearchSpace) -> Supernet:
    """A random supernet of the micro space by each rule."""
    return random_supernet(micro, sharing=request.param)


@pytest.mark.parametrize(
    "tokens", [1, 30, 70, 10_000]
)  # in a pass: a window, two, a window of five vectors, everything
def test_the_losses_of_many_vectors_are_those_of_their_extracted_models(
    supernet: Supernet, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_TOKENS", tokens)
    vectors = list(itertools.product((1, 2, 4), repeat=3))[::-2]
    alone = [mean_loss(supernet.extract(vector), WINDOWS) for vector in vectors]
    assert vector_losses(supernet, vectors, WINDOWS) == pytest.approx(alone, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(vectors=st.lists(st.tuples(*[st.sampled_from([1, 2, 4])] * 3), min_size=1, max_size=12))
def test_losses_come_in_the_order_of_the_vectors_however_often_one_is_named(
    micro: SearchSpace, vectors: list[Vector]
) -> None:
    supernet = random_supernet(micro, seed=1)
    each = {vector: vector_losses(supernet, [vector], WINDOWS)[0] for vector in set(vectors)}
    assert vector_losses(supernet, vectors, WINDOWS) == pytest.approx([each[vector] for vector in vectors], abs=1e-5)


def test_logits_in_pieces_make_the_same_losses(micro: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, vectors = random_supernet(micro), [(1, 2, 4), (4, 4, 4)]
    whole = vector_losses(supernet, vectors, WINDOWS)
    monkeypatch.setattr(decoder, "_LOGITS", 7 * 320)  # 7 tokens of 60 at once
    assert vector_losses(supernet, vectors, WINDOWS) == pytest.approx(whole, abs=1e-6)


def test_half_precision_keeps_differences_and_fp32_takes_over_where_it_overflows(
    micro: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; the CPU has the same autocast."""
    vectors = [(4, 4, 4), (1, 1, 1), (1, 2, 4)]
    for scale, tolerance, is_exact in ((1.0, 3e-3, False), (1e7, 0.0, True)):
        supernet = random_supernet(micro, spread=0.1)
        supernet.decoder.get_parameter("model.layers.1.mlp.up_proj.weight").data *= scale
        exact = np.array(vector_losses(supernet, vectors, WINDOWS))
        loss = InheritedLoss(supernet, WINDOWS, LossMemo(tmp_path / f"{scale}.jsonl"))
        monkeypatch.setattr(loss, "precision", "fp16")
        found = np.array(loss.of(vectors))
        assert np.ptp(found - exact) <= tolerance < np.ptp(exact)
        assert np.array_equal(found, exact) is is_exact


def test_the_standard_error_is_that_of_differences_on_the_same_windows(micro: SearchSpace, tmp_path: Path) -> None:
    supernet, memo = random_supernet(micro), tmp_path / "losses.jsonl"
    loss, vectors = InheritedLoss(supernet, WINDOWS, LossMemo(memo)), [(1, 2, 4), (2, 1, 1)]
    loss.of(vectors)
    largest = [mean_loss(supernet.extract((4, 4, 4)), window[None]) for window in WINDOWS]
    later = InheritedLoss(supernet, WINDOWS, LossMemo(memo))  # as another process, or after a kill
    for vector in vectors:
        own = [mean_loss(supernet.extract(vector), window[None]) for window in WINDOWS]
        direct = np.std(np.subtract(own, largest), ddof=1) / len(WINDOWS) ** 0.5
        assert loss.noise(vector) == later.noise(vector) == {"paired_se_nats": pytest.approx(direct, abs=1e-6)}
    assert later.noise((4, 4, 4)) == {"paired_se_nats": 0.0}
    LossMemo(memo).add({"1-1-1": 2.0})  # as earlier versions did
    assert InheritedLoss(supernet, WINDOWS, LossMemo(memo)).noise((1, 1, 1)) == {}
    single = InheritedLoss(supernet, WINDOWS[:1], LossMemo(tmp_path / "single.jsonl"))
    assert single((1, 2, 4)) and single.noise((1, 2, 4)) == {}


def test_a_training_starts_without_scipy() -> None:
    code = "import sys, nas.stages.train; assert 'scipy.stats' not in sys.modules"  # which takes most of a second
    subprocess.run([sys.executable, "-c", code], check=True)


def test_vectors_that_begin_alike_share_those_layers(micro: SearchSpace) -> None:
    supernet = random_supernet(micro)
    rows: list[int] = []
    for layer in supernet.decoder.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    vectors = [(1, 2, 4), (1, 2, 2), (1, 4, 4), (4, 1, 1)]
    vector_losses(supernet, vectors, WINDOWS)
    beginnings = [len({vector[: layer + 1] for vector in vectors}) for layer in range(3)]
    assert rows == [count * len(WINDOWS) for count in beginnings]


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    memo = tmp_path / "losses.jsonl"
    LossMemo(memo).add({"1-1": 3.0})
    with memo.open("a") as file:
        file.write('{"name": "2-2", "lo')
    LossMemo(memo).add({"4-4": 2.0})
    found = LossMemo(memo)
    assert [name in found for name in ("1-1", "2-2", "4-4")] == [True, False, True]
    assert found["4-4"] == 2.0


def test_a_loss_is_evaluated_once_and_remembered_on_disk(
    micro: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet, memo = random_supernet(micro), tmp_path / "cache" / "losses.jsonl"
    first = InheritedLoss(supernet, WINDOWS, LossMemo(memo))
    losses = first.of([(1, 1, 1), (4, 4, 4), (1, 1, 1)])
    assert losses[0] == losses[2] != losses[1]
    later = InheritedLoss(supernet, WINDOWS, LossMemo(memo))
    assert later((2, 2, 2)) == vector_losses(supernet, [(2, 2, 2)], WINDOWS)[0]
    assert len(memo.read_text().splitlines()) == 3

    def fail(*_: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(quality, "window_losses", fail)
    assert InheritedLoss(supernet, WINDOWS, LossMemo(memo)).of([(1, 1, 1), (2, 2, 2)]) == [losses[0], later((2, 2, 2))]
