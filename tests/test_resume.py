"""kill -9 in the middle, then the same command: the result is that of a run that nobody interrupted."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from nas.latency.predictor import STEP_REVISION
from nas.run import FinishedRun
from tests.conftest import Nas, Workspace, read_metrics
from tests.helpers import kill_when


def last_metrics(run: Path) -> dict[tuple[int, ...], dict[str, float]]:
    """The metrics of a run by step and kind; a repeated step counts as it was logged last."""
    return {(entry["step"], len(entry)): entry for entry in read_metrics(run)}


def test_training_goes_on_exactly_where_it_was_killed_though_a_line_of_metrics_was_cut_short(
    nas: Nas, workspace: Workspace
) -> None:
    options = ("train.steps=60", "train.checkpoint_every=7", "train.validate_every=25")
    arguments = ["train", *workspace.arguments[:-3], *options]
    killed, whole = workspace.runs / "train" / "killed", workspace.runs / "train" / "whole"
    for step in (10, 25):  # killed twice

        def due(at: int = step) -> bool:
            return any(entry["step"] > at for entry in read_metrics(killed))

        kill_when([*arguments, "name=killed"], workspace.path, due)
        with (killed / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 3, "loss')
    assert not (killed / "complete.json").exists()
    assert nas(*arguments, "name=killed").code == 0
    assert nas(*arguments, "name=whole").code == 0

    assert last_metrics(killed) == last_metrics(whole)
    ours, theirs = (load_file(run / "supernet.safetensors") for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_search_goes_on_exactly_where_it_was_killed(nas: Nas, workspace: Workspace) -> None:
    arguments = ["search", "--budget", "13", "sampler=nsga2", "sampler.population_size=5", *workspace.arguments]
    memo = next((workspace.runs / "cache").glob("losses-*.jsonl"))
    before = len(memo.read_text().splitlines())
    kill_when([*arguments, "name=killed"], workspace.path, lambda: len(memo.read_text().splitlines()) >= before + 4)
    killed, whole = workspace.runs / "search" / "killed", workspace.runs / "search" / "whole"
    assert not (killed / "complete.json").exists()
    assert nas(*arguments, "name=killed").code == 0
    memo.unlink()  # the uninterrupted run evaluates everything itself
    assert nas(*arguments, "name=whole").code == 0

    trials = pd.read_csv(whole / "trials.csv")
    assert len(trials) == trials["vector"].nunique() == 13
    for file in ("trials.csv", "front.csv"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()


def test_a_search_that_goes_on_keeps_its_supernet_and_its_latency_table(
    nas: Nas, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["search", "--budget", "12", "sampler=random", "seed=5", *workspace.arguments]
    memo = next((workspace.runs / "cache").glob("losses-*.jsonl"))
    before = len(memo.read_text().splitlines())
    kill_when([*arguments, "name=mine"], workspace.path, lambda: len(memo.read_text().splitlines()) >= before + 3)
    parents = json.loads((workspace.runs / "search" / "mine" / "run.json").read_text())["parents"]
    parts = workspace.arguments[:-3]
    assert nas("measure", parts[0], *workspace.arguments[-3:], "check=0", "name=newer").code == 0
    assert nas("train", *parts, "name=newer").code == 0
    with monkeypatch.context() as patch:
        patch.setitem(STEP_REVISION, "eager", 2)  # of the table more is said by now
        result = nas(*arguments, "name=mine")
    assert (result.code, "an earlier version" in result.out) == (0, True)
    assert json.loads((workspace.runs / "search" / "mine" / "run.json").read_text())["parents"] == parents
    assert nas(*arguments, "budget=3", "name=fresh").code == 0
    fresh = json.loads((workspace.runs / "search" / "fresh" / "run.json").read_text())["parents"]
    assert fresh["latency"]["path"].endswith("/newer")
    assert fresh["supernet"] == parents["supernet"]  # of equal ones the first, so that it stays the same one


def test_another_search_takes_up_an_interrupted_training(nas: Nas, workspace: Workspace) -> None:
    arguments = ["search", "--budget", "4", *workspace.arguments, "train.steps=60"]
    known = set((workspace.runs / "train").iterdir())

    def due() -> bool:
        return any(read_metrics(run) for run in set((workspace.runs / "train").iterdir()) - known)

    kill_when([*arguments, "name=before"], workspace.path, due)
    assert nas(*arguments, "name=after", "train.log_every=100").code == 0
    (resumed,) = set((workspace.runs / "train").iterdir()) - known
    assert FinishedRun(resumed, "train").config["train"]["log_every"] == 1  # as it was begun


def test_a_kill_after_the_completion_mark_leaves_a_finished_run(
    nas: Nas, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if path.name == "checkpoint.pt":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    command, run = ["train", *workspace.arguments[:-3], "name=late"], workspace.runs / "train" / "late"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        assert nas(*command).code == 1
    assert (run / "checkpoint.pt").exists()
    assert FinishedRun(run, "train").artifact("supernet.safetensors")
    assert "already finished" in nas(*command).err
