"""Several processes under torchrun: the same training as one process, and going on with another number of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.conftest import read_metrics

# One recipe each, and every part that changes how a step is computed but not what.
TRAININGS = {
    "ddp": ("train.parallel=ddp", "train.recipe=mixed", "train.sharing=separate"),
    "fsdp": ("train.parallel=fsdp", "train.recipe=sandwich", "train.recompute=true"),
}
STEPS = 20


def command(processes: int, micro_file: Path, text_file: Path, name: str, *more: str) -> list[str]:
    """A command line that trains a supernet of the micro space on so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    options: tuple[str, ...] = (
        "steps=20",
        "batch=16",
        "log_every=1",
        "validate_every=20",
        "validation_windows=2",
        "checkpoint_every=5",
    )
    options = tuple(f"train.{option}" for option in (*options, "learning_rate=1e-3"))
    stage = ["-m", "nas", "train", f"space={micro_file}", "data=text", f"data.path={text_file}", f"name={name}"]
    return [sys.executable, *torchrun, *stage, *options, *more]


def train(*arguments: object, cwd: Path) -> None:
    """Runs `command` to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr[-2000:]


def losses(run: Path) -> list[float]:
    """The training loss of every step."""
    by_step = {line["step"]: line["loss_nats"] for line in read_metrics(run) if "loss_nats" in line}
    return [by_step[step] for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("kind", TRAININGS)
def test_two_processes_are_one_and_either_goes_on_where_the_other_was_killed(
    kind: str, micro_file: Path, text_file: Path, tmp_path: Path
) -> None:
    how, runs = TRAININGS[kind], tmp_path / "runs" / "train"
    train(1, micro_file, text_file, "one", *how, cwd=tmp_path)
    train(2, micro_file, text_file, "two", *how, "train.accumulate=2", cwd=tmp_path)
    assert losses(runs / "two") == pytest.approx(losses(runs / "one"), abs=1e-5)
    one, two = (load_file(runs / name / "supernet.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4

    begun = subprocess.Popen(
        command(2, micro_file, text_file, "killed", *how),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (runs / "killed" / "checkpoint.pt").is_file():
        assert begun.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    for process in psutil.Process(begun.pid).children(recursive=True):
        process.kill()
    begun.kill()
    begun.wait()
    assert not (runs / "killed" / "complete.json").is_file()
    train(1, micro_file, text_file, "killed", *how, cwd=tmp_path)
    assert losses(runs / "killed") == pytest.approx(losses(runs / "one"), abs=1e-5)
