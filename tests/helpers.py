"""What several test modules need: damage to files, commands that are killed, and how a refusal looks."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nas import cli
from tests.conftest import FAST, Outcome

PROCESSES = multiprocessing.get_context("forkserver")  # imports once, and forks a process in milliseconds
PROCESSES.set_forkserver_preload(["nas.cli", "nas.stages.search", "tests.search_problem"])

TEXT = ("data=text", "data.path=text.txt")
TRAINING = tuple(argument for argument in FAST if argument.startswith("train."))
TIMING = tuple(argument for argument in FAST if argument not in TRAINING)

# Scaled rotary embeddings of a model with a context of 40 tokens.
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 2.5}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

Damage = Callable[[bytes], bytes] | None  # None removes the file


def check_refusal(outcome: Outcome, words: Sequence[str]) -> None:
    """Asserts that a command failed with one sentence that has all the words."""
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.out + outcome.err
    assert len(outcome.err.splitlines()) == 1 and outcome.err.endswith("\n"), outcome.err
    assert outcome.err.startswith("nas"), outcome.err
    for word in words:
        assert word in outcome.err


def flipped(content: bytes) -> bytes:
    """The content with eight bytes in its middle inverted."""
    at = len(content) // 2
    return content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 8]) + content[at + 8 :]


def to(content: str) -> Damage:
    """Damage that puts something else in place of the content."""
    return lambda _: content.encode()


def harm(path: Path, damage: Damage) -> None:
    """Damages a file."""
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))


def kill_when(command: Sequence[str], cwd: Path, due: Callable[[], bool]) -> None:
    """Starts a command and kills it with SIGKILL as soon as ``due``."""
    process = PROCESSES.Process(target=_run_command, args=(list(command), cwd))
    process.start()
    deadline = time.monotonic() + 120
    while not due():
        assert process.is_alive(), "the command ended before it was due to"
        assert time.monotonic() < deadline, "the command never got that far"
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _run_command(command: list[str], cwd: Path) -> None:
    os.chdir(cwd)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    sys.exit(cli.main(command))
