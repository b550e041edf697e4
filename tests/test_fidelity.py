"""Fidelity: which vectors are asked, what their losses say, and the stage that trains them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nas.config import TrainConfig
from nas.data.batches import validation_windows
from nas.errors import UserError
from nas.model import Decoder
from nas.quality import mean_loss
from nas.ranking import (
    agreement,
    bootstrap_interval,
    choose_some,
    choose_vectors,
    kendall,
    noise_ceiling,
    resampled_taus,
)
from nas.report.agreement import draw_fidelity
from nas.report.figure import figure
from nas.run import Run
from nas.space import SearchSpace, load_space, parse_vector
from nas.training import fit, text_loss
from tests.conftest import FAST, Nas, Workspace
from tests.helpers import kill_when

TINY = load_space("tiny")
QUICK = (
    "vectors=6",
    "equal_total=3",
    "alone.vectors=3",
    "alone.seeds=[0,1]",
    "further.steps=3",
    "validation_windows=4",
)
TRAINING = tuple(argument for argument in FAST if argument.startswith("train."))


@given(st.integers(2, 40), st.data())
def test_the_chosen_vectors_are_distinct_and_of_the_sets_asked_for(count: int, data: st.DataObject) -> None:
    equal_total = data.draw(st.integers(0, count))
    seed = data.draw(st.integers(0, 2**32 - 1))
    spread, equal = choose_vectors(TINY, count, equal_total, seed)
    assert (spread, equal) == choose_vectors(TINY, count, equal_total, seed)
    assert len(equal) == equal_total
    assert len({*spread, *equal}) == count == len(spread) + len(equal)
    assert {sum(TINY.check(vector)) for vector in equal} <= {20}  # half way between eight 1s and eight 4s
    assert list(map(sum, spread)) == sorted(map(sum, spread))
    if len(spread) > 1:
        assert (spread[0], spread[-1]) == (TINY.smallest, TINY.largest)


def test_all_vectors_of_a_space_can_be_chosen(micro: SearchSpace) -> None:
    spread, equal = choose_vectors(micro, 27, 6, seed=0)
    assert {*spread, *equal} == set(itertools.product((1, 2, 4), repeat=3))


@pytest.mark.parametrize(("count", "equal_total"), [(28, 2), (20, 8)])
def test_more_vectors_than_there_are_cannot_be_chosen(micro: SearchSpace, count: int, equal_total: int) -> None:
    with pytest.raises(UserError, match=r"27 vectors, at most 6 of one total; lower"):
        choose_vectors(micro, count, equal_total, seed=0)


def test_some_of_the_vectors_are_half_of_each_set_and_reach_both_ends() -> None:
    spread, equal = choose_vectors(TINY, 24, 12, seed=1)
    some = choose_some(spread, equal, 8)
    assert some[:4] == [spread[0], spread[4], spread[7], spread[11]]
    assert some[4:] == equal[:4]
    assert choose_some(spread, equal, 0) == []
    uneven = choose_some(spread[:3], equal, 14)
    assert sorted(uneven) == sorted([*spread[:3], *equal[:11]])


LOSSES = st.lists(st.integers(0, 5), min_size=2, max_size=12)


@given(LOSSES, st.randoms(use_true_random=False))
def test_kendalls_tau_counts_the_pairs_in_the_same_order(values: list[int], random: Random) -> None:
    true, predicted = np.array(values, float), np.array(random.sample(values, len(values)), float)
    pairs = itertools.combinations(range(len(values)), 2)
    signs = np.array([(np.sign(true[a] - true[b]), np.sign(predicted[a] - predicted[b])) for a, b in pairs])
    norm = np.sqrt((signs**2).sum(0).prod())
    assert kendall(predicted, true) == pytest.approx(signs.prod(1).sum() / norm if norm else np.nan, nan_ok=True)


@given(LOSSES, st.randoms(use_true_random=False))
def test_a_resampled_tau_is_that_of_the_sample(values: list[int], random: Random) -> None:
    true, predicted = np.array(values, float), np.array(random.sample(values, len(values)), float)
    counts = np.random.default_rng(len(values)).multinomial(len(values), np.full(len(values), 1 / len(values)), 5)
    samples = [kendall(np.repeat(predicted, row), np.repeat(true, row)) for row in counts]
    assert resampled_taus(predicted, true, counts) == pytest.approx(samples, nan_ok=True)


def test_an_interval_shrinks_with_more_vectors_and_holds_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (12, 120):
        true = rng.normal(size=count)
        predicted = true + rng.normal(size=count)
        low, high = bootstrap_interval(predicted, true, seed=1)
        assert low < kendall(predicted, true) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_the_noise_ceiling_is_how_well_halves_of_the_seeds_agree() -> None:
    order = np.arange(5.0)
    assert noise_ceiling(np.stack([order, order + 7], axis=1)) == pytest.approx(
        1
    )  # what a seed does to all alike is no noise
    assert noise_ceiling(np.stack([order, -order], axis=1)) == pytest.approx(-1)
    three = np.stack([order, order, -10 * order], axis=1)  # one seed against two: -1, and -1 twice with the wild one
    assert noise_ceiling(three) == pytest.approx(-1)
    assert np.isnan(noise_ceiling(order[:, None]))


def measured(vector: str, kind: str, loss: float, seed: int | None = None) -> dict[str, object]:
    """A row of measurements; vectors that total 7 are those of equal total."""
    total = sum(parse_vector(vector))
    facts = {"vector": vector, "total": total, "equal_total": total == 7, "kind": kind, "loss_nats": loss}
    return facts | {"seed": seed, "steps": None if seed is None else 10}


def test_agreement_holds_each_predictor_against_each_kind_of_trained_loss() -> None:
    vectors = ["1-1-1", "4-4-4", "4-2-1", "1-2-4", "2-1-4", "2-2-2"]
    inherited = dict(zip(vectors, [5.0, 1.0, 2.0, 4.0, 3.0, 4.5], strict=True))
    rows = [measured(vector, "inherited", loss) for vector, loss in inherited.items()]
    rows += [measured(vector, "further", 10 + loss, seed=9) for vector, loss in inherited.items()]
    rows += [
        measured(vector, "alone", -loss + noise, s)
        for vector, loss in inherited.items()
        for s, noise in ((0, 0.1), (1, 0))
    ]
    table = agreement(pd.DataFrame(rows)).set_index(["truth", "among", "predictor"]).astype(float)
    assert table.loc[("further", "all", "inherited"), "tau"] == pytest.approx(1)
    assert table.loc[("alone", "all", "inherited"), "tau"] == pytest.approx(-1)
    assert table.loc[("further", "equal total", "inherited"), "vectors"] == 3
    assert table["tau"].isna().to_dict()[("further", "equal total", "total")]  # a constant ranks nothing
    totals = [sum(parse_vector(vector)) for vector in vectors]
    by_hand = kendall(-np.array(totals, float), np.array(list(inherited.values())))
    assert table.loc[("further", "all", "total"), "tau"] == pytest.approx(by_hand)
    assert table.loc[("alone", "all", "inherited"), "ceiling"] == pytest.approx(1)
    assert table["ceiling"].isna().to_dict()[("further", "all", "inherited")]


def test_without_vectors_of_equal_total_only_the_whole_is_ranked(tmp_path: Path) -> None:
    rows = [measured(vector, "inherited", loss) for vector, loss in (("1-1-1", 3.0), ("2-2-2", 2.0), ("4-4-4", 1.0))]
    rows += [measured(str(row["vector"]), "further", 2.0, seed=9) | {"loss_nats": row["loss_nats"]} for row in rows]
    table = agreement(pd.DataFrame(rows))
    assert table["among"].tolist() == ["all", "all"]
    assert table["tau"].tolist() == pytest.approx([1, 1])
    with figure(tmp_path / "fidelity") as drawing:
        draw_fidelity(drawing, pd.DataFrame(rows), table, "no equal totals")
    assert (tmp_path / "fidelity.png").is_file()


@pytest.fixture
def arguments(workspace: Workspace) -> list[str]:
    """A fidelity command on the workspace's supernet."""
    supernet = next((workspace.runs / "train").iterdir()).relative_to(workspace.path)
    data = [argument for argument in workspace.arguments if argument.startswith("data")]
    return ["fidelity", f"supernet={supernet}", *data, *QUICK]


def test_the_stage_leaves_measurements_their_agreement_and_a_figure(
    nas: Nas, workspace: Workspace, arguments: list[str]
) -> None:
    assert nas(*arguments, "name=mine").code == 0
    run = workspace.runs / "fidelity" / "mine"
    rows = pd.read_csv(run / "measurements.csv")
    assert rows.groupby("kind").size().to_dict() == {"inherited": 6, "further": 6, "alone": 6}
    assert rows[rows["kind"] == "inherited"]["equal_total"].sum() == 3
    assert set(pd.read_csv(run / "agreement.csv")["truth"]) == {"further", "alone"}
    assert (run / "fidelity.png").stat().st_size > 10_000
    assert not list(run.rglob("checkpoint.pt"))


def test_a_model_trained_alone_is_the_plain_model_of_its_seed(
    nas: Nas, workspace: Workspace, arguments: list[str], micro: SearchSpace, tmp_path: Path
) -> None:
    assert nas(*arguments, "name=mine").code == 0
    rows = pd.read_csv(workspace.runs / "fidelity" / "mine" / "measurements.csv").query(
        "kind == 'alone' and vector == '4-4-4'"
    )
    tokens = {
        name: np.load(next(workspace.runs.glob(f"cache/tokens-*/{name}.npy"))) for name in ("train", "validation")
    }
    windows = validation_windows(tokens["validation"], 4, micro.shape.max_position_embeddings)
    options = TrainConfig(steps=6, batch=4, seed=1)
    plain = Decoder(micro.shape, micro.largest)
    plain.initialise(torch.Generator().manual_seed(1))
    (tmp_path / "plain").mkdir()
    fit(plain, text_loss(tokens["train"], options, 32), options, Run(tmp_path / "plain"), dict)
    with torch.no_grad():
        assert rows.set_index("seed").loc[1, "loss_nats"] == pytest.approx(mean_loss(plain, windows), abs=1e-6)


def test_models_trained_alone_serve_every_supernet_trained_alike(
    nas: Nas, workspace: Workspace, arguments: list[str]
) -> None:
    assert nas(*arguments, "name=first").code == 0
    assert nas("train", *workspace.arguments[:-3], "train.sharing=pooled", "name=pooled").code == 0
    assert nas(*arguments, "supernet=runs/train/pooled", "name=second").code == 0
    first, second = (
        pd.read_csv(workspace.runs / "fidelity" / name / "measurements.csv") for name in ("first", "second")
    )
    assert first[first["kind"] == "alone"].equals(second[second["kind"] == "alone"])
    assert not first.equals(second)
    trained = {path.name.split("-")[0] for path in (workspace.runs / "fidelity" / "second" / "trainings").iterdir()}
    assert trained == {"further"}


def test_a_comparison_goes_on_where_it_was_killed(nas: Nas, workspace: Workspace, arguments: list[str]) -> None:
    long = [*arguments, "further.steps=40", "checkpoint_every=7"]
    trainings = workspace.runs / "fidelity" / "killed" / "trainings"
    kill_when([*long, "name=killed"], workspace.path, lambda: len(list(trainings.glob("further-*"))) > 2)
    assert nas(*long, "name=killed").code == 0
    for memo in [*workspace.runs.glob("cache/further-*"), *workspace.runs.glob("cache/alone-*")]:
        memo.unlink()  # the uninterrupted one trains everything itself
    assert nas(*long, "name=whole").code == 0
    killed, whole = (
        (workspace.runs / "fidelity" / name / "measurements.csv").read_bytes() for name in ("killed", "whole")
    )
    assert killed == whole


def test_two_processes_share_the_trainings(workspace: Workspace, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "nas", *arguments, "further.steps=30", "alone.steps=30"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([*command, f"name={name}"], cwd=workspace.path, env=one_thread) for name in ("one", "two")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    one, two = (workspace.runs / "fidelity" / name for name in ("one", "two"))
    assert (one / "measurements.csv").read_bytes() == (two / "measurements.csv").read_bytes()
    made = [path.name for run in (one, two) for path in (run / "trainings").iterdir()]
    assert len(made) == len(set(made)) == 12
    assert all(list((run / "trainings").iterdir()) for run in (one, two))
