"""Fidelity: which vectors are compared, what their losses say, and the stage that trains them."""

import contextlib
import io
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from nas import cli, ranking
from nas.config import TrainConfig
from nas.data.batches import validation_windows
from nas.errors import UserError
from nas.files import read_json
from nas.model import Decoder
from nas.quality import LossMemo, mean_loss
from nas.ranking import (
    AGREEMENT,
    MEASUREMENTS,
    agreement,
    beyond_chance,
    bootstrap_interval,
    choose_some,
    choose_vectors,
    kendall,
    noise_ceiling,
)
from nas.report.agreement import draw_fidelity
from nas.report.figure import figure
from nas.run import Run
from nas.space import SearchSpace, format_vector, load_space, parse_vector
from nas.training.loop import fit
from nas.training.recipes import text_loss
from tests.conftest import Workspace
from tests.helpers import kill_when

TINY = load_space("tiny")
QUICK = (
    "vectors=6",
    "equal_total=3",
    "alone.vectors=3",
    "alone.seeds=[0,1]",
    "further.steps=15",
    "checkpoint_every=7",
    "validation_windows=4",
)


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """As many as tell the functions' behaviour."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_RESAMPLES", 100)
        yield


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


def test_an_interval_shrinks_with_more_vectors_and_holds_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (12, 120):
        true = rng.normal(size=count)
        predicted = true + rng.normal(size=count)
        low, high = bootstrap_interval(predicted, true[:, None], seed=1)
        assert low < kendall(predicted, true) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert bootstrap_interval(predicted, true[:, None], seed=1) == (low, high)


def test_an_interval_is_over_seeds_too() -> None:
    order = np.arange(40.0)
    assert bootstrap_interval(order, np.stack([order, order], axis=1), seed=0) == pytest.approx((1, 1))
    opposed = np.stack([order, -order / 2], axis=1)  # their mean is in order, and so is no draw of the second alone
    assert bootstrap_interval(order, opposed, seed=0) == pytest.approx((-1, 1))


def test_an_interval_leaves_out_constant_samples_and_is_empty_where_nothing_can_be_ranked() -> None:
    order = np.arange(3.0)  # one in nine resamples of three is constant
    assert bootstrap_interval(order, order[:, None], seed=0) == pytest.approx((1, 1))
    for few, losses in ((order, np.ones((3, 1))), (order[:1], order[:1, None])):
        assert np.isnan(bootstrap_interval(few, losses, seed=0)).all()


def test_agreement_beyond_chance_is_what_changes_dealt_at_random_do_not_give() -> None:
    before = np.array([1.0, 2.0, 3.0])
    # One of three vectors gets better by 1.5. On the first that keeps the order (τ = 1), on the second or third it
    # makes one pair of three wrong (τ = 1/3): dealt at random, 5/9 in the mean. Two of the six deals hit the first.
    first, last = (before - 1.5 * np.eye(3)[place] for place in (0, 2))
    assert beyond_chance(before, before, first, seed=0) == pytest.approx((5 / 9, 1, 1 / 3))
    assert beyond_chance(before, before, last, seed=0) == pytest.approx((5 / 9, (1 / 3 - 5 / 9) / (4 / 9), 1))
    # A predictor that has the first two in the wrong order: τ is 1/3, 1 and -1/3 by where the change is
    wrong, second = np.array([2.0, 1.0, 3.0]), before - 1.5 * np.eye(3)[1]
    assert beyond_chance(wrong, before, second, seed=0) == pytest.approx((1 / 3, 1, 1 / 3))


def test_a_change_that_is_alike_for_all_is_no_agreement() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=12)
    chance, corrected, p = beyond_chance(before, before, before - 0.05, seed=0)
    assert (chance, p) == pytest.approx((1, 1))
    assert np.isnan(corrected)
    other = before + rng.normal(size=12)  # another predictor gains nothing by it
    assert beyond_chance(other, before, before - 0.05, seed=0)[1] == pytest.approx(0, abs=1e-9)
    few = [beyond_chance(before, before, before - rng.normal(0.05, 0.3, 12), seed=0)[1] for _ in range(30)]
    assert abs(np.mean(few)) < 0.2  # changes that have nothing to do with the vector; τ itself is near 1
    assert np.isnan(beyond_chance(np.ones(12), before, before, seed=0)).all()


def test_the_noise_ceiling_is_how_well_the_other_seeds_rank_the_losses_of_one() -> None:
    order = np.arange(5.0)
    alike = np.stack([order, order + 7], axis=1)  # what a seed does to all alike is no noise
    assert noise_ceiling(alike) == pytest.approx(1)
    assert noise_ceiling(np.stack([order, -order], axis=1)) == pytest.approx(-1)
    three = np.stack([order, order, -order / 2], axis=1)  # the first two by one another and the wild one, in order
    assert noise_ceiling(three) == pytest.approx((1 + 1 - 1) / 3)
    assert np.isnan(noise_ceiling(order[:, None]))


def measured(vector: str, kind: str, loss: float, seed: int | None = None) -> dict[str, object]:
    """A row of measurements; vectors that total 7 are those of equal total."""
    total = sum(parse_vector(vector))
    row = {"vector": vector, "total": total, "equal_total": total == 7, "kind": kind, "loss_nats": loss}
    return row | {"seed": seed, "steps": None if seed is None else 10}


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
    table = agreement(pd.DataFrame(rows)).set_index(["truth", "among", "predictor"]).astype(float).sort_index()
    assert table.loc[("further", "all", "inherited"), "tau"] == pytest.approx(1)
    assert table.loc[("alone", "all", "inherited"), "tau"] == pytest.approx(-1)
    assert table.loc[("further", "equal total", "inherited"), "vectors"] == 3
    assert table["tau"].isna().to_dict()[("further", "equal total", "total")]  # a constant ranks nothing
    totals = [sum(parse_vector(vector)) for vector in vectors]
    by_hand = kendall(-np.array(totals, float), np.array(list(inherited.values())))
    assert table.loc[("further", "all", "total"), "tau"] == pytest.approx(by_hand)
    of_alone = table[["seeds", "one_seed", "ceiling"]].to_dict("index")["alone", "all", "inherited"]
    assert of_alone == pytest.approx({"seeds": 2, "one_seed": -1, "ceiling": 1})
    unknown = table.isna()
    assert unknown.loc[("further", "all", "inherited"), "ceiling"]
    assert unknown.loc[("further", "all", "inherited"), "corrected"]  # all were changed alike
    assert unknown.loc["alone", ["by_chance", "corrected", "p"]].all().all()


def test_without_vectors_of_equal_total_only_the_whole_is_ranked(tmp_path: Path) -> None:
    rows = [measured(vector, "inherited", loss) for vector, loss in (("1-1-1", 3.0), ("2-2-2", 2.0), ("4-4-4", 1.0))]
    rows += [measured(str(row["vector"]), "further", 2.0, seed=9) | {"loss_nats": row["loss_nats"]} for row in rows]
    table = agreement(pd.DataFrame(rows))
    assert table["among"].tolist() == ["all", "all"]
    assert table["tau"].tolist() == pytest.approx([1, 1])
    with figure(tmp_path / "fidelity") as drawing:
        draw_fidelity(drawing, pd.DataFrame(rows), table)
    assert (tmp_path / "fidelity.png").is_file()


@pytest.fixture(scope="module")
def compared(pristine: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The session's search and one comparison of its supernet, called ``mine``."""
    path = tmp_path_factory.mktemp("compared")
    shutil.copytree(pristine.runs, path / "runs")
    with contextlib.chdir(path):
        assert cli.main([*command(pristine), "name=mine"]) == 0
    return Workspace(path, pristine.arguments)


def command(workspace: Workspace) -> list[str]:
    """A fidelity command on the workspace's supernet."""
    supernet = next((workspace.runs / "train").iterdir()).relative_to(workspace.path)
    data = [argument for argument in workspace.arguments if argument.startswith("data")]
    return ["fidelity", f"supernet={supernet}", *data, *QUICK]


def measurements(workspace: Workspace, name: str) -> bytes:
    """The file of a comparison."""
    return (workspace.runs / "fidelity" / name / "measurements.csv").read_bytes()


def trainings(workspace: Workspace, name: str) -> list[str]:
    """The trainings that a comparison made itself, so far."""
    return [path.name for path in (workspace.runs / "fidelity" / name).glob("trainings/*")]


def test_the_stage_leaves_measurements_their_agreement_and_a_figure(compared: Workspace) -> None:
    run = compared.runs / "fidelity" / "mine"
    rows = pd.read_csv(run / "measurements.csv")
    info = read_json(run / "run.json")
    commit = info["git"]["commit"] + ("-dirty" if info["git"]["dirty"] else "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else info["device"]["cpu"]
    made = {"device": device, "gqa_nas": info["versions"]["gqa-nas"]}
    made |= {"python": info["versions"]["python"], "torch": info["versions"]["torch"], "commit": commit}
    assert list(rows) == [*MEASUREMENTS, *made, "date"]
    assert rows[list(made)].drop_duplicates().to_dict("records") == [made]
    assert rows.groupby("kind").size().to_dict() == {"inherited": 6, "further": 6, "alone": 6}
    assert rows[rows["kind"] == "inherited"]["equal_total"].sum() == 3
    table = pd.read_csv(run / "agreement.csv")
    assert list(table) == [*AGREEMENT, *made, "date"]
    assert table["truth"].drop_duplicates().tolist() == ["alone", "further"]
    assert (run / "fidelity.png").stat().st_size > 10_000
    assert not list(run.rglob("checkpoint.pt"))


def test_a_model_trained_alone_is_the_plain_model_of_its_seed(
    compared: Workspace, micro: SearchSpace, tmp_path: Path
) -> None:
    rows = pd.read_csv(compared.runs / "fidelity" / "mine" / "measurements.csv").query(
        "kind == 'alone' and vector == '4-4-4'"
    )
    tokens = {name: np.load(next(compared.runs.glob(f"cache/tokens-*/{name}.npy"))) for name in ("train", "validation")}
    windows = validation_windows(tokens["validation"], 4, micro.shape.max_position_embeddings)
    options = TrainConfig(steps=6, batch=4, seed=1)
    plain = Decoder(micro.shape, micro.largest)
    plain.initialise(torch.Generator().manual_seed(1))
    fit(plain, text_loss(tokens["train"], options, 32), options, Run(tmp_path), dict)
    with torch.no_grad():
        assert rows.set_index("seed").loc[1, "loss_nats"] == pytest.approx(mean_loss(plain, windows), abs=1e-6)


def test_models_trained_alone_serve_every_supernet_trained_alike(
    compared: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compared.path)
    assert cli.main(["train", *compared.arguments[:-3], "train.sharing=pooled", "name=pooled"]) == 0
    assert cli.main([*command(compared), "supernet=runs/train/pooled", "name=pooled"]) == 0
    first, second = (pd.read_csv(io.BytesIO(measurements(compared, name))) for name in ("mine", "pooled"))
    assert first[first["kind"] == "alone"].equals(second[second["kind"] == "alone"])
    assert not first.equals(second)
    assert {name.split("-")[0] for name in trainings(compared, "pooled")} == {"further"}


def test_a_comparison_goes_on_where_it_was_killed_and_leaves_to_another_process_what_that_trains(
    compared: Workspace, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.path)
    arguments = [*command(workspace), "name=killed"]
    kill_when(arguments, workspace.path, lambda: len(trainings(workspace, "killed")) >= 3)
    memo = LossMemo(next(workspace.runs.glob("cache/further-*.jsonl")))
    names = [format_vector(vector) + " seed 1000" for vector in itertools.product((1, 2, 4), repeat=3)]
    others = [FileLock(memo.file.with_name(f".{memo.file.stem}-{name}.lock")) for name in names if name not in memo]
    for lock in others:
        lock.acquire()
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        assert not [name for name in LossMemo(memo.file) if name not in memo]
        for lock in others:
            lock.release()

    monkeypatch.setattr(time, "sleep", wait)
    assert cli.main(arguments) == 0
    assert waits == [1]
    assert measurements(workspace, "killed") == measurements(compared, "mine")
    assert sorted(trainings(workspace, "killed")) == sorted(trainings(compared, "mine"))
