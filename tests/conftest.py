"""A micro space, a little real text, and one search of it that many tests read."""

import argparse
import gc
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import pytest
import torch

from nas import cli
from nas.model import Supernet
from nas.space import SearchSpace, Vector, load_space

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")  # where transformers copies the code of exported models
os.environ["HF_HUB_OFFLINE"] = "1"

MICRO = """\
num_hidden_layers: 3
hidden_size: 32
num_attention_heads: 4
head_dim: 8
intermediate_size: 256
vocab_size: 320
max_position_embeddings: 32
tie_word_embeddings: true
kv_groups: [1, 2, 4]
known_vectors:
  favourite: 4-1-2
"""

FAST = (
    "train.steps=6",
    "train.batch=4",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.validate_every=4",
    "train.validation_windows=4",
    "workload.batch=2",
    "measure.rounds=2",
    "check=3",
)


class Outcome(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


Nas = Callable[..., Outcome]


def pytest_collection_finish() -> None:
    """Spares the garbage collector the many objects of the libraries, which stay."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Gives them back: a library that finds its objects alive at the end takes them for leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run have in common, with what they make once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        if not (folder / "text.txt").is_file():
            (folder / "micro.yaml").write_text(MICRO)
            texts = (Path(str(module.__file__)).read_text() for module in (argparse, subprocess, json))
            (folder / "text.txt").write_text("\n".join(texts))
    return folder


@pytest.fixture(scope="session")
def micro_file(shared: Path) -> Path:
    """A three-layer space in a YAML file."""
    return shared / "micro.yaml"


@pytest.fixture(scope="session")
def micro(micro_file: Path) -> SearchSpace:
    """The space of `micro_file`."""
    return load_space(str(micro_file))


@pytest.fixture(scope="session")
def text_file(shared: Path) -> Path:
    """Some 150 kB of real text."""
    return shared / "text.txt"


@pytest.fixture
def nas(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nas:
    """Runs a command line in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    return run


class Workspace(NamedTuple):
    """A working directory with a finished search of the micro space, called ``base``, and its parents."""

    path: Path
    arguments: tuple[str, ...]

    @property
    def runs(self) -> Path:
        """Its runs/ folder."""
        return self.path / "runs"


@pytest.fixture(scope="session")
def pristine(shared: Path, micro_file: Path, text_file: Path) -> Workspace:
    """One search with everything before it, by the command line; for ``workspace`` to copy, not for tests."""
    arguments = (f"space={micro_file}", "data=text", f"data.path={text_file}", *FAST)
    with filelock.FileLock(shared / ".lock"), chdir(shared):
        if not Path("runs/search/base/complete.json").is_file():
            assert cli.main(["search", "--budget", "9", "name=base", *arguments]) == 0
    return Workspace(shared, arguments)


@pytest.fixture
def workspace(pristine: Workspace, tmp_path: Path) -> Workspace:
    """A finished search in the working directory of ``nas``; the test's own copy, to add to or to spoil."""
    shutil.copytree(pristine.runs, tmp_path / "runs")
    return Workspace(tmp_path, pristine.arguments)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl so far; one that is just being written, or was cut short, is skipped."""
    file = run / "metrics.jsonl"
    values = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        with suppress(ValueError):
            values.append(json.loads(line))
    return values


def random_supernet(
    space: SearchSpace, seed: int = 0, spread: float = 0.3, sharing: str = "sliced", output_rank: int = 0
) -> Supernet:
    """A supernet with random weights, large enough for vectors to differ clearly."""
    supernet = Supernet(space, sharing, output_rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, spread, generator=generator)
    return supernet.eval()


def logits_at(supernet: Supernet, tokens_BT: torch.Tensor, vectors: Sequence[Vector]) -> torch.Tensor:
    """A supernet's logits, each row of tokens at its own vector."""
    logits: torch.Tensor = supernet(tokens_BT, torch.tensor(supernet.space.choice_indices(vectors)))
    return logits
