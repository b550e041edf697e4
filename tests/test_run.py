"""Run directories: what resumes one, what refuses to build on one, and who makes what can be reused."""

import json
import threading
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import pytest

from nas.errors import AlreadyFinishedError, InUseError, UserError
from nas.files import read_csv, write_csv
from nas.run import FinishedRun, check_begun, find_or_make, find_runs, start_run
from tests.helpers import Damage, flipped, harm, to


def made(path: Path, stage: str = "train", **config: Any) -> FinishedRun:
    """A finished run with one artifact."""
    with start_run(path, stage, config) as run:
        (path / "artifact.csv").write_text("vector,loss_nats\n4-1-2,1.5\n")
        run.finish()
    return FinishedRun(path)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("complete.json", None, "runs/train/mine is unfinished; run its command again with name=mine"),
        ("complete.json", to("{"), r"complete\.json cannot be read as JSON .* restore it"),
        ("complete.json", to("[]"), r"complete\.json does not hold a JSON object; restore it"),
        ("complete.json", to('{"artifacts": 1}'), r"complete\.json lacks a key; restore it"),
        ("run.json", to('{"stage": "train"}'), r"run\.json or .* restore it"),
        ("run.json", to("{}"), r"is corrupt: run\.json or .* restore it"),
        ("run.json", None, "is not a run directory"),
        ("artifact.csv", flipped, r"artifact\.csv is corrupt: it changed after the run finished; restore it"),
        ("artifact.csv", None, r"artifact\.csv is missing; run 'nas train' again"),
    ],
)
def test_nothing_is_built_on_a_damaged_run(tmp_path: Path, file: str, damage: Damage, words: str) -> None:
    path = made(tmp_path / "runs/train/mine").path
    harm(path / file, damage)
    with pytest.raises(UserError, match=words):
        FinishedRun(path, "train").artifact("artifact.csv")


def test_a_run_of_a_sweep_is_named_with_it(tmp_path: Path) -> None:
    path = made(tmp_path / "runs/train/sweep/train.seed-1").path
    (path / "complete.json").unlink()
    with pytest.raises(UserError, match=r"name=sweep/train\.seed-1"):
        FinishedRun(path)


def test_another_stages_run_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "a").path
    with pytest.raises(UserError, match="written by 'nas train'; give a run of 'nas search'"):
        FinishedRun(path, "search")
    with pytest.raises(UserError, match="belongs to 'nas train'; give another name="):
        check_begun(path, "search", {})


def test_a_parent_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    parent = made(tmp_path / "parent")
    with start_run(tmp_path / "child", "export", {}, parents={"supernet": parent}) as run:
        run.finish()
    child = FinishedRun(tmp_path / "child")
    assert child.parent("supernet").path == parent.path
    harm(parent.path / "complete.json", to('{"artifacts": {}}'))
    with pytest.raises(UserError, match=r"is not the supernet that .* was made from"):
        child.parent("supernet")
    (child.path / "complete.json").unlink()
    with pytest.raises(UserError, match="begun from other parent runs"), start_run(child.path, "export", {}):
        pass


def begin(path: Path, config: dict[str, Any], finish: bool = False, **more: Any) -> None:
    """Begins a run or goes on with it."""
    with start_run(path, "train", config, **more) as run:
        if finish:
            run.finish()


def test_a_run_is_resumed_with_the_same_config_and_no_other(tmp_path: Path) -> None:
    config = {"seed": 0, "train": {"steps": 3}}
    begin(tmp_path, config)
    first = (tmp_path / "run.json").read_text()
    with pytest.raises(UserError, match=r"another config \(train\.steps was 3, now 4\); repeat .* name="):
        begin(tmp_path, {"seed": 0, "train": {"steps": 4}})
    begin(tmp_path, config, finish=True)
    assert (tmp_path / "run.json").read_text() == first
    with pytest.raises(AlreadyFinishedError, match="already finished; give another name= or remove it"):
        begin(tmp_path, config)


def test_what_decides_nothing_may_differ_and_stays_as_it_was_recorded(tmp_path: Path) -> None:
    for words in ("first", "second"):
        begin(tmp_path, {"seed": 0, "latency": words}, free=("latency",))
    assert json.loads((tmp_path / "run.json").read_text())["config"]["latency"] == "first"
    with pytest.raises(UserError, match="seed was 0, now 1"):
        begin(tmp_path, {"seed": 1, "latency": "first"}, free=("latency",))
    assert check_begun(tmp_path, "train", {"latency": "first"}) == {"seed": 0, "latency": "first"}
    assert check_begun(tmp_path / "nowhere", "train", {"seed": 7}) == {}


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(InUseError, match="in use by another process; wait for it or give another name=")
    with filelock.FileLock(tmp_path / ".lock"), refused, start_run(tmp_path, "train", {}):
        pass


def test_what_is_there_is_found_and_what_is_not_is_made_once(tmp_path: Path) -> None:
    calls = list[int]()

    def make() -> None:
        calls.append(1)
        made(tmp_path / "space-1a2b")

    runs = [find_or_make(tmp_path / "space-1a2b", "train", make) for _ in range(2)]
    assert len(calls) == 1
    assert runs[0].digest() == runs[1].digest()


def test_what_another_process_is_making_is_awaited(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begun, done = threading.Event(), threading.Event()

    def other() -> None:
        with start_run(tmp_path, "train", {}) as run:
            begun.set()
            done.wait(10)
            run.finish()

    def make() -> None:
        threading.Timer(0.1, done.set).start()
        with start_run(tmp_path, "train", {}):
            raise AssertionError("made twice")

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(10)
    assert find_or_make(tmp_path, "train", make).path == tmp_path
    thread.join()
    assert capfd.readouterr().out.count("Waiting") == 1


def test_what_was_finished_a_moment_ago_is_taken(tmp_path: Path) -> None:
    def make() -> None:
        made(tmp_path)
        raise AlreadyFinishedError

    assert find_or_make(tmp_path, "train", make).path == tmp_path


def test_corrupt_runs_are_passed_over_with_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept, spoilt = made(tmp_path / "train/kept"), made(tmp_path / "train/spoilt")
    harm(spoilt.path / "run.json", to("{}"))
    assert [run.path for run in find_runs(tmp_path, "train")] == [kept.path]
    assert "Passing over" in capfd.readouterr().err


def test_vectors_of_one_layer_are_read_as_text(tmp_path: Path) -> None:
    write_csv(tmp_path / "trials.csv", pd.DataFrame({"vector": ["4", "1"], "loss_nats": [3.5, 3.6]}))
    assert list(read_csv(tmp_path / "trials.csv", ["vector", "loss_nats"])["vector"]) == ["4", "1"]
