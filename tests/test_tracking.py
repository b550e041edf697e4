"""Trackers of others: what real runs wrote there, read back by the trackers' own readers."""

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import Nas, Workspace, read_metrics
from tests.helpers import check_refusal

Series = dict[str, list[tuple[int, float]]]  # steps and values by name


def read_tensorboard(runs: Path, run: str) -> tuple[Series, set[str]]:
    """A run's numbers, and the names of its figures and tables."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "tensorboard" / run))
    events.Reload()
    tags: dict[str, Any] = events.Tags()
    series = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in tags["scalars"]}
    return series, {*tags["images"], *(name.removesuffix("/text_summary") for name in tags["tensors"])}


def read_mlflow(runs: Path, run: str) -> tuple[Series, set[str]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("gqa-nas")
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run}'")
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    series = {name: [(one.step, one.value) for one in history] for name, history in histories.items()}
    return series, {Path(file.path).stem for file in client.list_artifacts(found.info.run_id)}


def read_wandb(runs: Path, run: str) -> tuple[Series, set[str]]:
    """W&B has no public reader of what it writes offline: a log of LevelDB's format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (runs / "wandb").glob(f"offline-run-*/run-{run.replace('/', '-')}.wandb")
    data, at, message, series, others = file.read_bytes(), 7, b"", Series(), set()
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:  # of a block: too little for the header of another piece
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        message, at = message + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(message)
            message = b""
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                if inner:  # a file: its size, path and so on
                    others.add(name)
                else:
                    series.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return series, others


def read_trackio(runs: Path, run: str) -> tuple[Series, set[str]]:
    from trackio.sqlite_storage import SQLiteStorage

    assert (runs / "trackio" / "gqa-nas.db").is_file()
    series, others = Series(), set()
    for record in SQLiteStorage.get_logs("gqa-nas", run):
        for name, value in record.items():
            if isinstance(value, int | float):
                series.setdefault(name, []).append((record["step"], value))
            else:
                others.add(name.removeprefix("table/"))
    return series, others


READERS: dict[str, Callable[[Path, str], tuple[Series, set[str]]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
    "trackio": read_trackio,
}


@pytest.mark.parametrize("tracker", READERS)
def test_curves_vectors_front_and_figures_are_in_the_tracker(nas: Nas, workspace: Workspace, tracker: str) -> None:
    if not importlib.util.find_spec(tracker):  # not imported: Trackio reads its folder's name then
        pytest.skip(f"needs {tracker}")
    runs, logger = Path("runs"), f"logger={tracker}"
    arguments = [argument for argument in workspace.arguments if not argument.startswith(("workload", "meas", "check"))]
    for command in (
        ("train", *arguments, "name=curves"),
        ("search", "--budget", 5, *workspace.arguments, "name=tracked"),
        ("report", "run=runs/search/tracked", "name=tracked"),
    ):
        outcome = nas(*command, logger)
        assert outcome.code == 0, outcome.err
    curves, _ = READERS[tracker](runs, "train/curves")
    losses = [(line["step"], line["loss_nats"]) for line in read_metrics(runs / "train/curves") if "loss_nats" in line]
    assert len(losses) == 6
    assert [step for step, _ in curves["loss_nats"]] == [step for step, _ in losses]
    assert [value for _, value in curves["loss_nats"]] == pytest.approx([loss for _, loss in losses])
    vectors, others = READERS[tracker](runs, "search/tracked")
    trials = pd.read_csv(runs / "search/tracked/trials.csv")
    for column in ("loss_nats", "decode_ms", "on_front"):
        assert [value for _, value in vectors[f"evaluated/{column}"]] == pytest.approx(trials[column].astype(float))
    assert "front" in others
    assert {"front", "groups", "hypervolume", "metrics"} <= READERS[tracker](runs, "report/tracked")[1]


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(
    nas: Nas, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else find(name))
    check_refusal(
        nas("search", *workspace.arguments, "logger=wandb", "name=none"), ["logger=wandb", "pip install wandb"]
    )
    assert not Path("runs/search/none").exists()
