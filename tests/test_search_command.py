"""nas search by the command line: whole spaces, limits, several processes, and what earlier searches leave."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import pytest
import torch

from nas.latency.memory import MemoryModel
from nas.latency.pool import LayerPool
from nas.latency.predictor import STEP_REVISION, Point, Workload
from nas.model import Supernet
from nas.quality import window_losses
from nas.space import Vector, parse_vector, space_from_dict
from tests.conftest import MICRO, Nas, Outcome, Workspace


def trials(folder: Path) -> pd.DataFrame:
    """The evaluated vectors of a search."""
    return pd.read_csv(folder / "trials.csv")


Search = Callable[..., tuple[pd.DataFrame, Outcome]]


@pytest.fixture
def search(nas: Nas, workspace: Workspace) -> Search:
    """Runs a search that must succeed; the vectors that it evaluated, and its outcome."""

    def run(name: str, *arguments: object) -> tuple[pd.DataFrame, Outcome]:
        result = nas("search", f"name={name}", *workspace.arguments, *arguments)
        assert result.code == 0, result.err
        return trials(workspace.runs / "search" / name), result

    return run


@pytest.fixture
def forgotten(workspace: Workspace) -> None:
    """No loss is remembered from the search that is there."""
    for memo in (workspace.runs / "cache").glob("losses-*"):
        memo.unlink()


def test_the_whole_space_is_evaluated_where_that_is_asked(search: Search, workspace: Workspace) -> None:
    (workspace.path / "small.yaml").write_text(MICRO.replace("[1, 2, 4]", "[[1, 4], [1, 4], [1, 2, 4]]"))
    exhaustive, _ = search("all", "space=small.yaml", "sampler=exhaustive")
    front, _ = search("front", "space=small.yaml", "budget=40")
    assert exhaustive["vector"].nunique() == len(exhaustive) == 2 * 2 * 3
    assert set(front["vector"]) == set(exhaustive["vector"])
    ordered = [table.sort_values("vector", ignore_index=True) for table in (exhaustive, front)]
    pd.testing.assert_frame_equal(ordered[0], ordered[1])


def test_a_space_too_large_for_all_of_it_is_refused(
    nas: Nas, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.stages.search._MOST", 26)
    result = nas("search", "budget=all", "name=all", *workspace.arguments)
    assert result.code == 1
    assert "budget=all is too much for the 27 vectors of micro; give a number" in result.err


def test_limits_hold_and_an_impossible_one_is_said_before_anything_is_trained(
    nas: Nas, search: Search, workspace: Workspace
) -> None:
    memory = "constraints.max_memory_gib"
    gib = trials(workspace.runs / "search" / "base")["memory_gib"]
    limit = (gib.min() + gib.max()) / 2
    small, _ = search("small", "--budget", 27, "sampler=random", f"{memory}={limit}")
    assert 5 < len(small) < 27
    assert small["memory_gib"].max() <= limit

    before = set(workspace.path.rglob("complete.json"))
    refused = nas("search", f"{memory}={gib.min() / 2}", "name=none", *workspace.arguments, "train.steps=7")
    assert refused.code == 1
    assert f"the closest that a vector of micro comes is {gib.min():.9g}" in refused.err
    assert set(workspace.path.rglob("complete.json")) == before


@pytest.mark.usefixtures("forgotten")
def test_several_processes_share_one_search(search: Search, workspace: Workspace) -> None:
    shared, outcome = search("shared", "--budget", 24, "workers=2", "sampler=random")
    assert outcome.err == ""
    assert shared["vector"].nunique() == len(shared) == 24
    base = trials(workspace.runs / "search" / "base")
    losses = [table.set_index("vector")["loss_nats"] for table in (shared, base)]
    both = pd.concat(losses, axis=1, join="inner")
    assert len(both) >= 6  # of 9 and 24 among 27
    assert (both.iloc[:, 0] - both.iloc[:, 1]).abs().max() < 1e-5


@pytest.mark.usefixtures("forgotten")
def test_a_search_starts_with_what_an_earlier_one_knows(search: Search, workspace: Workspace) -> None:
    base = workspace.runs / "search" / "base"
    table, warm = search("warm", "--budget", 5, f"warm_start={base}", "seed=3")
    assert "9 losses taken over, 0 vectors to be evaluated early" in warm.out
    assert table["vector"].nunique() == len(table) == 9 + 5  # what was known is no part of the budget
    pd.testing.assert_frame_equal(table.iloc[:9].drop(columns="on_front"), trials(base).drop(columns="on_front"))
    parents = json.loads((workspace.runs / "search" / "warm" / "run.json").read_text())["parents"]
    assert set(parents) == {"supernet", "latency", "warm_start_0"}

    table, other = search("other", "--budget", 7, f"warm_start=[{base}]", "train.seed=9")
    front = pd.read_csv(base / "front.csv")
    assert f"0 losses taken over, {len(front)} vectors to be evaluated early" in other.out
    assert len(table) == 7


@pytest.mark.usefixtures("forgotten")
def test_a_search_of_everything_evaluates_no_loss_that_it_took_over(
    search: Search, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = list[Vector]()

    def counted(supernet: Supernet, vectors: list[Vector], *how: Any) -> torch.Tensor:
        evaluated.extend(vectors)
        return window_losses(supernet, vectors, *how)

    monkeypatch.setattr("nas.quality.window_losses", counted)
    base = workspace.runs / "search" / "base"
    search("whole", "--budget", "all", f"warm_start={base}")
    known = set(map(parse_vector, trials(base)["vector"]))
    assert len(evaluated) == len(set(evaluated)) == 27 - len(known) + 1
    assert known & set(evaluated) == {(4, 4, 4)}  # again: standard errors need the losses of its windows


def test_names_do_not_decide_a_supernet(search: Search, workspace: Workspace, micro_file: Path) -> None:
    renamed = workspace.path / "renamed.yaml"
    renamed.write_text(micro_file.read_text() + "  another: 1-1-4\n")
    before = set(workspace.runs.glob("train/*"))
    (supernet,) = before
    for name, more in (("found", ()), ("given", (f"supernet={supernet}",))):
        search(name, "--budget", 5, f"space={renamed}", *more)
    assert set(workspace.runs.glob("train/*")) == before


def test_a_supernet_that_another_process_finishes_at_that_moment_is_taken(
    search: Search, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished,) = workspace.runs.glob("train/*")
    aside = finished.rename(workspace.path / "aside")

    def others_finish(*_: object) -> None:
        if aside.exists():
            aside.rename(finished)

    monkeypatch.setattr("nas.stages.train.check_training_memory", others_finish)
    assert len(search("late", "--budget", 5)[0]) == 5


def test_jobs_of_a_cluster_launcher_share_one_search_and_tell_of_their_failures(nas: Nas, workspace: Workspace) -> None:
    pool = ("-m", "hydra/launcher=submitit_local", "worker=0,1")
    shared = ("--budget", 8, "sampler=random", f"storage=sqlite:///{workspace.path}/db", "name=pool")
    result = nas("search", *pool, *shared, *workspace.arguments)
    assert result.code == 0, result.err
    tables = [trials(workspace.runs / "search" / "pool" / f"worker-{number}") for number in (0, 1)]
    assert tables[0]["vector"].nunique() == len(tables[0]) == 8
    pd.testing.assert_frame_equal(tables[0], tables[1])
    failed = nas("train", *pool[:2], "name=other", "data=text")
    assert failed.code == 1
    assert "data.path is needed" in failed.err


def test_who_finds_the_run_directory_in_use_evaluates_for_it(nas: Nas, workspace: Workspace) -> None:
    folder = workspace.runs / "search" / "shared"
    folder.mkdir()
    alone = ("search", "--budget", 10, "sampler=random", "name=shared", *workspace.arguments)
    arguments = (*alone, f"storage=sqlite:///{workspace.path}/db")
    with filelock.FileLock(folder / ".lock"):
        joined = nas(*arguments)
        assert nas(*alone).code == 1  # nobody else's study to join
    assert joined.code == 0, joined.err
    assert "only evaluates for it" in joined.out
    assert not (folder / "trials.csv").exists()
    memo = next((workspace.runs / "cache").glob("losses-*.jsonl"))
    evaluated = memo.read_text()
    assert nas(*arguments).code == 0
    assert trials(folder)["vector"].nunique() == 10
    assert memo.read_text() == evaluated  # all of it was done


def test_workers_must_agree_before_anything_is_trained_and_can_then_still_join(nas: Nas, workspace: Workspace) -> None:
    search = ("search", "--budget", 6, f"storage=sqlite:///{workspace.path}/db")
    assert nas(*search, "name=pool", *workspace.arguments).code == 0
    measured, trained = (next((workspace.runs / stage).iterdir()) for stage in ("measure", "train"))
    other = (*search, "runs_dir=elsewhere", "name=pool", f"latency={measured}", *workspace.arguments)
    before = set(workspace.path.rglob("run.json"))
    for key, here in (("seed", "seed=1"), ("objectives", "objectives=[loss_nats,decode_ms]"), ("budget", "budget=7")):
        refused = nas(*other, here)
        assert refused.code == 1
        assert f"was begun with another {key}" in refused.err
    assert set(workspace.path.rglob("run.json")) == before
    warm = nas(*other, f"supernet={trained}", f"warm_start={workspace.runs / 'search' / 'base'}")
    assert "was begun with another warm_start" in warm.err
    joined = nas(*other, f"supernet={trained}")
    assert joined.code == 0, joined.err
    tables = [trials(runs / "search" / "pool") for runs in (workspace.runs, workspace.path / "elsewhere")]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert "give all workers the same name=" in nas(*search, *workspace.arguments).err


def test_a_loss_that_is_no_number_is_said(nas: Nas, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.quality.InheritedLoss.__call__", lambda *_: float("nan"))
    result = nas("search", "--budget", 6, "name=diverged", *workspace.arguments)
    assert result.code == 1
    assert "the loss of 1-1-1 is nan: the supernet has diverged" in result.err


def test_batch_max_gives_every_vector_the_largest_batch_that_fits(search: Search, workspace: Workspace) -> None:
    limit = 0.005
    table, outcome = search("max", "--budget", 6, "workload.batch=max", f"workload.memory_gib={limit}", "check=0")
    assert f"batch max in {limit} GiB" in outcome.out
    config = json.loads((workspace.runs / "search" / "max" / "run.json").read_text())["config"]
    space = space_from_dict("micro", {key: value for key, value in config["space"].items() if key != "name"})
    memory = MemoryModel(space.shape, Workload(**config["workload"]), on_gpu=False)
    vectors = [parse_vector(text) for text in table["vector"]]
    assert table["batch"].tolist() == [memory.largest_batch(vector, limit * 2**30) for vector in vectors]
    assert table["batch"].nunique() > 2
    assert table["memory_gib"].max() <= limit
    assert table["tokens_per_s"].to_numpy() == pytest.approx((1e3 * table["batch"] / table["decode_ms"]).to_numpy())


def test_a_table_measured_for_the_workload_is_taken_before_a_newer_one_but_not_if_its_step_is_an_earlier_one(
    nas: Nas, search: Search, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (measured,) = workspace.runs.glob("measure/*")
    space = workspace.arguments[0]
    newer = ("workload.batch=3", "measure.batches=[1]", "measure.rounds=2", "check=0", "name=newer")
    assert nas("measure", space, *newer).code == 0
    assert f"(runs/measure/{measured.name})" in search("exact", "--budget", 3)[1].out
    assert "(runs/measure/newer)" in search("other", "--budget", 3, "workload.batch=3")[1].out
    monkeypatch.setitem(STEP_REVISION, "eager", 2)
    assert nas("measure", space, "measure.batches=[1,4]", *newer[:1], *newer[2:4], "name=present").code == 0
    _, present = search("present", "--budget", 3)
    assert "(runs/measure/present)" in present.out
    assert "an earlier version" not in present.out


@pytest.mark.parametrize(("stage", "what"), [("measure", "latency table"), ("train", "supernet")])
def test_a_search_does_not_go_on_without_what_it_was_begun_with(
    nas: Nas, workspace: Workspace, stage: str, what: str
) -> None:
    (workspace.runs / "search" / "base" / "complete.json").unlink()
    shutil.rmtree(workspace.runs / stage)
    refused = nas("search", "--budget", 9, "name=base", *workspace.arguments)
    assert refused.code == 1
    assert f"the {what} that this search was begun with is gone; restore it" in refused.err


def test_a_workload_that_memory_did_not_let_be_measured_is_refused_before_training(
    nas: Nas, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = LayerPool.prepare

    def short(pool: LayerPool, point: Point) -> tuple[Callable[[], Any], int]:
        if point.phase == "decode" and point.batch == 4 and 4 in point.groups:
            raise torch.OutOfMemoryError("planted")
        return prepare(pool, point)

    monkeypatch.setattr(LayerPool, "prepare", short)
    monkeypatch.setattr("nas.stages.train.Training.make", lambda *_: pytest.fail("trained"))
    command = ("search", "--budget", 4, *workspace.arguments, "workload.batch=4", "measure.batches=[1,2]")
    for attempt in ("once", "twice"):
        refused = nas(*command, f"name={attempt}", "seed=1", "train.seed=1")
        assert (refused.code, len(refused.err.splitlines())) == (1, 1), refused.err
        assert "memory ended before it covered micro at batch 4" in refused.err


def test_a_price_and_an_interval_become_columns(nas: Nas, search: Search, workspace: Workspace) -> None:
    priced = ("cost.price_per_hour=3.6", "device=nvidia-a10g", "workload.dtype=bf16", "workload.batch=8")
    table, _ = search("a10g", "--budget", 4, *priced)
    assert table["cost_per_million_tokens"].to_numpy() == pytest.approx((1e3 / table["tokens_per_s"]).to_numpy())
    assert (table["decode_ms_low"] < table["decode_ms"]).all()
    assert (table["decode_ms"] < table["decode_ms_high"]).all()
    assert "joules_per_token" not in table  # nobody measured it

    measured = next((workspace.runs / "measure").iterdir())
    beyond = ("workload.batch=3", f"latency={measured}")  # it has 2 and fewer
    refused = nas("search", "--budget", 4, "name=beyond", *workspace.arguments, *beyond)
    assert refused.code == 1
    assert "does not cover micro" in refused.err
