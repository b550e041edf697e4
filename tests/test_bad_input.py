"""Mistakes by the command line: exit code 1, one sentence that helps, and nothing that looks finished.

What a module refuses by itself is tested at that module, or in `test_what_is_wrong_is_named_where_it_is_decided`.
"""

import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest
import torch

from nas.config import AloneConfig, Fidelity, WorkloadConfig, build
from nas.errors import UserError, is_out_of_memory
from nas.export.hf import HfExporter
from nas.files import read_json
from nas.latency import find_device, resolve_workload, this_device
from nas.model import Supernet
from nas.model.pretrained import resolve_space
from nas.quality import InheritedLoss, LossMemo
from nas.space import SearchSpace, format_vector
from nas.stages import fidelity
from tests.conftest import FAST, MICRO, Nas, Outcome, Workspace, random_supernet, read_metrics
from tests.helpers import TEXT, TIMING, TRAINING, Damage, check_refusal, flipped, harm, to

DEFAULTS = {
    "train": ("space=micro.yaml", *TEXT, *TRAINING),
    "measure": ("space=micro.yaml", *TIMING),
    "search": ("space=micro.yaml", *TEXT, *FAST),
}

Refused = Callable[[Sequence[object], Sequence[str]], None]


@pytest.fixture
def files(tmp_path: Path, micro_file: Path, text_file: Path) -> None:
    """micro.yaml and a short text.txt in the working directory."""
    shutil.copy(micro_file, tmp_path)
    (tmp_path / "text.txt").write_text(text_file.read_text()[:60_000])


@pytest.fixture
def refused(nas: Nas, files: None, tmp_path: Path) -> Refused:  # noqa: ARG001
    """Runs a command beside `files` and asserts that it is refused as it should be."""

    def run(arguments: Sequence[object], words: Sequence[str]) -> None:
        before = set(tmp_path.rglob("complete.json"))
        check_refusal(nas(*arguments), words)
        assert set(tmp_path.rglob("complete.json")) == before

    return run


def only(folder: Path, pattern: str) -> Path:
    """The one path that a pattern matches."""
    (path,) = folder.glob(pattern)
    return path


def with_runs(command: str, workspace: Workspace) -> list[str]:
    """A command line with the run directories for {train} and {measure}, and the workspace's own arguments."""
    found = {stage: only(workspace.runs / stage, "*").relative_to(workspace.path) for stage in ("train", "measure")}
    stage, *given = command.format(**found).split()
    return [stage, *(workspace.arguments if stage == "search" else ()), *given]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``size``: what a full disk does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train data=books", ["data/books", "hf, stdlib, text"]),
        ("train +train.setps=3", ["no key train.setps", "--help"]),
        ("train data=text", ["data.path is needed"]),
        ("search sampler=cmaes", ["sampler/cmaes", "exhaustive, front, nsga2, random, tpe"]),
        ("report run=nowhere", ["nowhere", "does not exist"]),
        ("export run=nowhere", ["nowhere", "is not a run directory"]),
        ("train space=nowhere", ["'nowhere'", "tiny", ".yaml"]),
        ("train train.steps=abc", ["train.steps", "'abc'", "Integer"]),
        ("train name=..", ["name", "'..'"]),
        (f"train name={'n' * 300}", ["too long", "name="]),
        ("train runs_dir=text.txt", ["text.txt", "runs_dir="]),
        ("train runs_dir=/proc/nowhere", ["/proc/nowhere", "runs_dir="]),
        ("measure device=nvidia-a10g", ["'nvidia-a10g'", "device=this"]),
        ("measure publish=text.txt", ["text.txt", "fix that path"]),
        ("search objectives=loss_nats", ["objectives", "list"]),
        ("search --budget -3", ["'-3'", "200", "30m"]),
        ("search --budget auto sampler=nsga2", ["budget=auto", "NSGAIISampler", "sampler=front"]),
        ("search sampler=nsga2 sampler.population_size=1", ["NSGAIISampler", "population_size", "equal to 2"]),
        (
            "search constraints.max_kv_bytes_per_token=95 device=nvidia-a10g",
            ["constraints.max_kv_bytes_per_token is 95", "closest", "is 96"],
        ),
        ("search name=n storage=mysql://user:secret@host/name", ["storage is not", "postgresql://"]),
        ("search latency=nowhere", ["nowhere", "finished run"]),
        ("measure measure.contexts=[33]", ["32", "measure.contexts"]),
        ("train train.accumulate=3", ["4 texts", "train.accumulate"]),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(refused: Refused, command: str, words: list[str]) -> None:
    stage, *given = command.split()
    refused([stage, *(DEFAULTS.get(stage, ()) if "data=" not in command else ()), *given], words)


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (lambda _: resolve_space("nowhere.yaml"), ["'nowhere.yaml'", "tiny"]),
        (lambda _: find_device("nowhere"), ["'nowhere'", "this", "nvidia-a10g"]),
        (
            lambda space: resolve_workload(WorkloadConfig(context=33), space.shape, this_device()),
            ["context is 33", "32"],
        ),
        (lambda space: resolve_workload(WorkloadConfig(prompt=33), space.shape, this_device()), ["prompt is 33", "32"]),
        (lambda _: build({"_target_": "optuna.samplers.NSGAIISampler", "population_size": 0}), ["population_size"]),
        (
            lambda _: build({"_target_": "optuna.samplers.NSGAIISampler", "population_size": "many"}),
            ["NSGAIISampler", "many"],
        ),
        (
            lambda _: build({"_target_": "nas.search.front_sampler.FrontSampler", "flavour": 0}, seed=0),
            ["FrontSampler", "flavour"],
        ),
        (lambda space: Supernet(space, "stolen"), ["train.sharing", "'stolen'", "sliced"]),
        (lambda _: fidelity.run(Fidelity(vectors=1), Path("x")), ["vectors is 1", "two or more"]),
        (
            lambda _: fidelity.run(Fidelity(alone=AloneConfig(vectors=25)), Path("x")),
            ["alone.vectors is 25", "2 to 24"],
        ),
        (
            lambda _: fidelity.run(Fidelity(alone=AloneConfig(seeds=[1, 1])), Path("x")),
            ["alone.seeds is [1, 1]", "once"],
        ),
        (lambda _: fidelity.run(Fidelity(vectors=8), Path("x")), ["equal_total is 12 of 8 vectors", "raise vectors"]),
    ],
)
def test_what_is_wrong_is_named_where_it_is_decided(
    micro: SearchSpace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[SearchSpace], object],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, ValueError)) as refusal:
        refuse(micro)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run graphs")
def test_a_graph_is_refused_on_a_cpu(refused: Refused) -> None:
    refused(["measure", *DEFAULTS["measure"], "workload.runtime=graph"], ["workload.runtime=graph", "GPU", "eager"])


def test_an_unknown_stage_is_refused_and_the_process_ends_with_that_exit_code() -> None:
    done = subprocess.run([sys.executable, "-m", "nas", "trian"], capture_output=True, text=True)
    check_refusal(Outcome(done.returncode, done.stdout, done.stderr), ["'trian'", "train, measure, search"])


@pytest.mark.parametrize("arguments", [["trian.steps=3"], ["--bad"], ["a b=3"], ["sampler=front,tpe"]])
def test_hydras_usage_errors_exit_with_2(nas: Nas, arguments: list[str]) -> None:
    outcome = nas("search", *arguments)
    assert outcome.code == 2
    assert outcome.err and "Traceback" not in outcome.err


def test_a_misspelt_key_is_named_as_it_was_typed(nas: Nas) -> None:
    for key in ("trian", "train.step", "constraints.max_foo"):
        outcome = nas("search", f"{key}=3")
        assert (outcome.code, outcome.err) == (
            2,
            f"nas search: there is no key {key}; nas search --help lists the keys\n",
        )


def test_values_with_a_comma_are_told_from_a_sweep(nas: Nas) -> None:
    outcome = nas("train", "init=p/a,b")
    assert outcome.code == 2
    assert outcome.err == (
        "nas train: init.checkpoint=p/a,b is several values; quote a text with commas, "
        "'init.checkpoint=\"p/a,b\"', or sweep with -m\n"
    )


@pytest.mark.usefixtures("files")
def test_a_bad_run_of_a_sweep_does_not_stop_the_others(nas: Nas, tmp_path: Path) -> None:
    outcome = nas("train", "-m", *DEFAULTS["train"], "train.sharing=stolen,sliced", "name=sweep")
    check_refusal(outcome, ["'stolen'"])
    assert [mark.parent.name for mark in tmp_path.rglob("complete.json")] == ["train.sharing-sliced"]


@pytest.mark.parametrize("command", ["measure", "search device=nvidia-a10g"])
def test_a_space_that_is_too_large_is_refused_before_any_text_is_read(
    refused: Refused, tmp_path: Path, command: str
) -> None:
    (tmp_path / "huge.yaml").write_text(MICRO.replace("intermediate_size: 256", "intermediate_size: 1000000000000"))
    refused([*command.split(), "space=huge.yaml"], ["huge", "GiB", "smaller space"])
    assert not (tmp_path / "runs" / "cache").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export run=runs/search/base select=nonsense", ["'nonsense'", "knee"]),
        ("export run={train}", ["nas train", "give a run of 'nas search'"]),
        ("report run=runs/cache", ["runs/cache", "holds no run"]),
        ("search latency={measure} workload.batch=7", ["{measure}", "batch 7", "measure that"]),
        ("search supernet={train} space=other.yaml", ["{train}", "space", "give the same space="]),
        ("search supernet={train} data.path=other.txt", ["{train}", "data", "give the same data="]),
        ("fidelity supernet={train} data=text data.path=other.txt", ["{train}", "another text", "the same data="]),
        ("fidelity supernet={train} data=text data.path=text.txt vectors=28", ["vectors is 28", "27 vectors", "lower"]),
        ("search --budget 9 name=base", ["runs/search/base", "already finished", "name="]),
    ],
)
def test_a_run_that_does_not_fit_is_refused(
    refused: Refused, workspace: Workspace, text_file: Path, command: str, words: list[str]
) -> None:
    (workspace.path / "other.yaml").write_text(MICRO.replace("rms_norm_eps", "") + "rms_norm_eps: 0.001\n")
    (workspace.path / "other.txt").write_text(2 * text_file.read_text())
    shutil.copy(text_file, workspace.path / "text.txt")
    refused(
        with_runs(command, workspace), [with_runs(f"x {word}", workspace)[1] if "{" in word else word for word in words]
    )


def test_a_vector_that_was_not_evaluated_is_refused(refused: Refused, workspace: Workspace) -> None:
    evaluated = set(pd.read_csv(workspace.runs / "search/base/trials.csv")["vector"])
    vector = next(v for v in map(format_vector, itertools.product((1, 2, 4), repeat=3)) if v not in evaluated)
    refused(["export", "run=runs/search/base", f"select={vector}"], [vector, "did not evaluate", "trials.csv"])


@pytest.mark.parametrize(
    ("pattern", "damage", "command", "words"),
    [
        ("search/base/trials.csv", flipped, "export run=runs/search/base", ["trials.csv is corrupt", "restore it"]),
        ("search/base/complete.json", None, "report run=runs/search/base", ["unfinished", "name=base"]),
        ("train/*/supernet.safetensors", flipped, "search", ["supernet.safetensors is corrupt", "restore it"]),
        ("measure/*/table.csv", None, "search latency={measure}", ["table.csv is missing", "nas measure"]),
        ("measure/*/latency.json", to("{}"), "search latency={measure}", ["latency.json is corrupt", "restore it"]),
    ],
)
def test_a_damaged_run_is_refused(
    refused: Refused, workspace: Workspace, pattern: str, damage: Damage, command: str, words: list[str]
) -> None:
    harm(only(workspace.runs, pattern), damage)
    refused(with_runs(command, workspace), words)


def test_a_damaged_study_is_refused_when_the_search_goes_on(refused: Refused, workspace: Workspace) -> None:
    harm(workspace.runs / "search/base/complete.json", None)
    harm(workspace.runs / "search/base/study.db", to("no database at all, " * 100))
    refused(["search", *workspace.arguments, "--budget", "9", "name=base"], ["study.db", "restore it"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=1", ["seed was 0, now 1"]),
        ("workload.batch=1", ["begun with another", "workload"]),
        ("data.path=text.txt", ["data.path was"]),
        ("space=tiny", ["space.name was micro, now tiny"]),
    ],
)
def test_another_config_under_the_same_name_is_refused(
    refused: Refused, workspace: Workspace, change: str, words: list[str]
) -> None:
    harm(workspace.runs / "search/base/complete.json", None)
    arguments = ["search", *workspace.arguments, "--budget", "9", "name=base"]
    kept = [argument for argument in arguments if argument.split("=")[0] != change.split("=")[0]]
    refused([*kept, change], ["runs/search/base", "name=", *words])


def test_a_damaged_run_of_another_kind_stops_nobody(nas: Nas, workspace: Workspace) -> None:
    for stage, file in (("train", "run.json"), ("measure", "latency.json")):
        spoilt = workspace.runs / stage / "spoilt"
        shutil.copytree(only(workspace.runs / stage, "*"), spoilt)
        (spoilt / file).write_text("{}")
        (spoilt / "complete.json").touch()  # the newest is looked at first
    result = nas("search", *workspace.arguments, "--budget", "4", "name=mine")
    assert result.code == 0, result.err
    assert "Passing over runs/train/spoilt" in result.err
    assert "runs/measure/spoilt/latency.json is corrupt" in result.err
    assert "Timing" not in result.out
    assert "Training" not in result.out


def test_a_damaged_memory_of_losses_is_passed_over(micro: SearchSpace, tmp_path: Path) -> None:
    memo = tmp_path / "losses.jsonl"
    memo.write_bytes(b'[1]\n{"name": "1-1-1", "loss_nats": "x"}\n\xff\n{"name": "1-1-1", "loss_nats": 2.5}\n{"nam')
    loss = InheritedLoss(random_supernet(micro), torch.zeros(1, 5, dtype=torch.int64), LossMemo(memo))
    assert loss((1, 1, 1)) == 2.5


@pytest.fixture
def exported(nas: Nas, workspace: Workspace) -> Path:
    """An exported model in its run directory, relative to the working directory."""
    assert nas("export", "run=runs/search/base", "select=knee", "name=mine").code == 0
    return only(workspace.runs, "export/mine/*/").relative_to(workspace.path)


def test_a_damaged_export_is_not_finetuned(refused: Refused, exported: Path) -> None:
    harm(exported / "model.safetensors", flipped)
    refused(["finetune", f"checkpoint={exported}", *TEXT], ["model.safetensors is corrupt", "restore it"])
    shutil.copytree(exported, exported.with_name("second"))
    refused(["finetune", f"checkpoint={exported.parent}", *TEXT], ["2 models", f"{exported.parent}/"])


@pytest.fixture(scope="module")
def model(micro: SearchSpace, pristine: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that no run wrote."""
    folder = tmp_path_factory.mktemp("model") / "elsewhere"
    tokenizer = only(pristine.runs, "train/*/tokenizer.json")
    HfExporter().write(random_supernet(micro).extract((4, 1, 2)), tokenizer, folder, {})
    return folder


def test_ctrl_c_during_training_says_how_to_go_on(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train" / "mine"

    def press_ctrl_c() -> None:
        while not read_metrics(folder):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press_ctrl_c, daemon=True)
    presser.start()
    command = ["train", *DEFAULTS["train"], "train.steps=100000", "name=mine"]
    refused(command, ["interrupted", "same command", "name=mine"])
    presser.join()
    assert not (folder / "complete.json").exists()
    assert read_json(folder / "run.json")["stage"] == "train"


@pytest.mark.usefixtures("files")
def test_ctrl_c_amid_a_write_is_still_a_ctrl_c(
    refused: Refused, nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # what torch.save makes of it

    command = ["train", *DEFAULTS["train"], "name=mine"]
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", save)
        refused(command, ["interrupted", "same command", "name=mine"])
    assert not (tmp_path / "runs/train/mine/checkpoint.pt").exists()
    assert nas(*command).code == 0


@pytest.mark.usefixtures("files")
def test_a_ctrl_c_that_a_library_swallows_comes_again(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(*_: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        time.sleep(30)
        raise AssertionError("never interrupted")

    monkeypatch.setattr("nas.cli._INSIST_S", 0.2)
    monkeypatch.setattr("nas.stages.train.Training.make", swallow)
    refused(["train", *DEFAULTS["train"], "name=mine"], ["interrupted", "same command", "name=mine"])


def test_a_full_disk_stops_a_training_that_then_goes_on(refused: Refused, nas: Nas) -> None:
    arguments = ["train", *DEFAULTS["train"], "name=mine"]
    with file_size_limit(500_000):
        refused(arguments, ["cannot write runs/train/mine/checkpoint.pt", "free some space", "same command again"])
    assert nas(*arguments).code == 0


@pytest.mark.parametrize(
    ("size", "command", "words"),
    [
        (2_000, "train", ["cannot write runs/", "tokenizer.json"]),
        (20_000, "train", ["cannot write into runs"]),  # the tokens
        (300_000, "train train.checkpoint_every=100", ["cannot write runs/", "supernet.safetensors"]),
        (6_000, "measure", ["cannot write runs/", "samples.csv"]),
    ],
)
def test_a_full_disk_is_named_whichever_library_meets_it(
    refused: Refused, size: int, command: str, words: list[str]
) -> None:
    stage, *given = command.split()
    with file_size_limit(size):
        refused([stage, *DEFAULTS[stage], *given], [*words, "free some space"])


@pytest.mark.parametrize(
    ("size", "command", "words"),
    [
        (50_000, "search", ["study.db", "free disk space"]),
        (100_000, "export run=runs/search/base", ["model.safetensors", "free some space"]),
        (2_000, "report run=runs/search/base", ["front.png", "free some space"]),
    ],
)
def test_a_full_disk_stops_what_builds_on_other_runs(
    refused: Refused, workspace: Workspace, size: int, command: str, words: list[str]
) -> None:
    with file_size_limit(size):
        refused(with_runs(command, workspace), words)


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "another runs_dir="),
        (errno.EROFS, "another runs_dir="),
    ],
)
def test_what_the_system_refuses_is_named_with_its_fix(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("nas.stages.measure.measure_space", fail)
    refused(["measure", *DEFAULTS["measure"]], ["some/file", os.strerror(number), fix])


def test_a_fault_of_the_system_that_no_user_can_fix_keeps_its_traceback(
    nas: Nas, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("nas.stages.measure.measure_space", fail)
    with pytest.raises(OSError, match="Input/output"):
        nas("measure", "space=tiny")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("planted"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_in_all_its_shapes(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize(
    ("place", "command", "fix"),
    [
        (
            "nas.training.recipes.row_losses",
            "train space=micro.yaml data=text data.path=text.txt",
            "lower train.batch",
        ),
        ("nas.quality.window_losses", "search seed=1 budget=3", "lower workers, train.batch"),
        (
            "nas.stages.generate.generate",
            "generate checkpoint=model prompt=import new_tokens=2",
            "lower batch or new_tokens",
        ),
        (
            "nas.model.pretrained.load_file",
            "generate checkpoint=model prompt=import new_tokens=2",
            "lower batch or new_tokens",
        ),
        ("nas.stages.export.select", "export run=runs/search/base", "smaller space"),
        ("nas.stages.measure.measure", "measure space=micro.yaml", "lower workload.batch"),
    ],
)
def test_memory_that_runs_out_is_one_sentence_whoever_meets_it(
    refused: Refused,
    workspace: Workspace,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    command: str,
    fix: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 3")

    shutil.copytree(model, workspace.path / "model")
    for memo in workspace.runs.glob("cache/losses-*"):
        memo.unlink()
    monkeypatch.setattr(place, fail)
    refused(with_runs(command, workspace), ["memory ran out (CUDA out of memory)", fix, "machine with more"])
