"""Several processes, as torchrun starts them: the same training as one process, and going on with another number."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from nas import cli
from nas.run import Run
from tests import two_processes
from tests.conftest import read_metrics

STEPS = 20
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "nas"]
OPTIONS = (
    f"steps={STEPS}",
    "batch=16",
    "log_every=1",
    f"validate_every={STEPS}",
    "validation_windows=2",
    "checkpoint_every=5",
)


class Trainings:
    """Trains supernets of the micro space, in this process or in two others."""

    def __init__(self, path: Path, micro_file: Path, text_file: Path, options: tuple[str, ...]) -> None:
        self.path = path / "runs" / "train"
        given = [f"train.{option}" for option in (*OPTIONS, "learning_rate=1e-3", *options)]
        self.command = ["train", f"space={micro_file}", "data=text", f"data.path={text_file}", *given]

    def here(self, name: str, *more: str) -> int:
        """Trains in this process."""
        return cli.main([*self.command, f"name={name}", *more])

    def in_two(self, name: str, *more: str, launcher: Sequence[str]) -> "subprocess.Popen[bytes]":
        """Begins to train in two processes."""
        command = [sys.executable, *launcher, *self.command, f"name={name}", *more]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def losses(self, name: str) -> list[float]:
        """The training loss of every step so far."""
        by_step = {line["step"]: line["loss_nats"] for line in read_metrics(self.path / name) if "loss_nats" in line}
        return [by_step[step] for step in sorted(by_step)]


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a training in this process stop as by Ctrl-C."""
    log = Run.log

    def interrupted(run: Run, **values: Any) -> None:
        log(run, **values)
        if values["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", interrupted)


# One recipe each, and everything that changes how a step is computed but not what.
@pytest.mark.parametrize(
    ("options", "launcher", "killed"),
    [
        (("parallel=ddp", "recipe=mixed", "sharing=separate"), TORCHRUN, False),
        (("parallel=fsdp", "recipe=sandwich", "recompute=true"), [two_processes.__file__], True),
    ],
    ids=["ddp", "fsdp"],
)
def test_two_processes_train_as_one_and_either_goes_on_where_the_other_stopped(
    options: tuple[str, ...],
    launcher: Sequence[str],
    killed: bool,
    micro_file: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    trainings = Trainings(tmp_path, micro_file, text_file, options)
    assert trainings.here("one") == 0
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        assert trainings.here("both", "train.accumulate=2") == 1
    processes = trainings.in_two("both", "train.accumulate=2", launcher=launcher)
    if killed:
        while len(trainings.losses("both")) < 12:
            assert processes.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        for process in psutil.Process(processes.pid).children(recursive=True):
            process.kill()
        processes.kill()
        processes.wait()
        assert not (trainings.path / "both" / "complete.json").is_file()
        assert trainings.here("both", "train.accumulate=2") == 0
    assert processes.wait(timeout=300) == 0 or killed

    assert len(trainings.losses("one")) == STEPS
    assert trainings.losses("both") == pytest.approx(trainings.losses("one"), abs=1e-5)
    one, both = (load_file(trainings.path / name / "supernet.safetensors") for name in ("one", "both"))
    assert one.keys() == both.keys()
    assert max(float((one[name] - both[name]).abs().max()) for name in one) < 1e-4
