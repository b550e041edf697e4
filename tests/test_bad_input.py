"""Every mistake that a user can make: exit code 1, one sentence that helps, and nothing that looks finished."""

import bz2
import errno
import gzip
import itertools
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
import zstandard

from nas.files import read_json
from nas.quality import InheritedLoss, LossMemo
from nas.space import SearchSpace, format_vector
from tests.conftest import FAST, MICRO, Nas, Outcome, Workspace, random_supernet, read_metrics

TEXT = ("data=text", "data.path=text.txt")
TRAINING = tuple(argument for argument in FAST if argument.startswith("train."))
TIMING = tuple(argument for argument in FAST if argument not in TRAINING)
DEFAULTS = {
    "train": ("space=micro.yaml", *TEXT, *TRAINING),
    "measure": ("space=micro.yaml", *TIMING),
    "search": ("space=micro.yaml", *TEXT, *FAST),
    "fidelity": TEXT,
}

Refused = Callable[[Sequence[object], Sequence[str]], None]
Damage = Callable[[bytes], bytes] | None  # None removes the file


def check_refusal(outcome: Outcome, words: Sequence[str]) -> None:
    """Asserts that a command failed with one sentence that has all the words."""
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.out + outcome.err
    assert len(outcome.err.splitlines()) == 1 and outcome.err.endswith("\n"), outcome.err
    assert outcome.err.startswith("nas"), outcome.err
    for word in words:
        assert word in outcome.err


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


def flipped(content: bytes) -> bytes:
    """The content with eight bytes in its middle inverted."""
    at = len(content) // 2
    return content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 8]) + content[at + 8 :]


def halved(content: bytes) -> bytes:
    """The first half of the content."""
    return content[: len(content) // 2]


def to(content: str) -> Damage:
    """Damage that puts something else in place of the content."""
    return lambda _: content.encode()


def harm(path: Path, damage: Damage) -> None:
    """Damages a file."""
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))


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
        ("train space=nowhere", ["'nowhere'", "tiny", ".yaml"]),
        ("train space=nowhere.yaml", ["'nowhere.yaml'", "tiny"]),
        ("search device=nowhere", ["'nowhere'", "this", "nvidia-a10g"]),
        ("measure device=nvidia-a10g", ["'nvidia-a10g'", "device=this"]),
        ("search objectives=[loss_nats,speed]", ["'speed'", "tokens_per_s"]),
        ("search objectives=[loss_nats]", ["loss_nats", "two or three"]),
        ("search objectives=[loss_nats,loss_nats]", ["loss_nats", "different"]),
        ("search objectives=loss_nats", ["objectives", "list"]),
        ("search --budget 0", ["'0'", "200", "30m"]),
        ("search --budget abc", ["'abc'", "200", "30m"]),
        ("search --budget -3", ["'-3'", "200", "30m"]),
        ("search --budget=0s", ["'0s'", "200", "30m"]),
        ("search sampler=nsga2 sampler.population_size=0", ["NSGAIISampler", "population_size"]),
        ("search sampler=nsga2 sampler.population_size=many", ["NSGAIISampler", "many"]),
        ("search +sampler.flavour=0", ["FrontSampler", "flavour"]),
        ("search +sampler.draws=-1", ["FrontSampler", "draws is -1", "at least 0"]),
        ("search constraints.max_memory_gib=0", ["constraints.max_memory_gib is 0", "positive"]),
        (
            "search constraints.max_kv_bytes_per_token=95 device=nvidia-a10g",
            ["constraints.max_kv_bytes_per_token is 95", "closest", "is 96"],
        ),
        ("search name=n storage=mysql://user:secret@host/name", ["storage is not", "postgresql://"]),
        ("search name=n storage=nonsense", ["storage is not", "postgresql://"]),
        ("search warm_start=nowhere", ["nowhere", "finished run"]),
        ("search workers=0", ["workers is 0", "positive"]),
        ("search seed=-1", ["seed is -1", "between 0 and"]),
        ("search supernet=nowhere", ["nowhere", "finished run"]),
        ("search latency=nowhere", ["nowhere", "finished run"]),
        ("search workload.context=33", ["workload.context is 33", "32"]),
        ("search workload.prompt=33", ["workload.prompt is 33", "32"]),
        ("search workload.batch=0", ["workload.batch is 0", "positive"]),
        ("measure workload.dtype=int8", ["workload.dtype", "'int8'", "bf16"]),
        ("measure measure.contexts=[33]", ["32", "measure.contexts"]),
        ("measure measure.batches=[]", ["measure.batches", "positive"]),
        ("measure measure.seed=-1", ["measure.seed is -1", "between 0 and"]),
        ("measure check=-1", ["check is -1", "0 or more"]),
        ("measure publish=text.txt", ["text.txt", "fix that path"]),
        ("train train.steps=0", ["train.steps is 0", "positive"]),
        ("train train.steps=abc", ["train.steps", "'abc'", "Integer"]),
        ("train train.seed=-1", ["train.seed is -1", "between 0 and"]),
        ("train train.seed=4294967296", ["train.seed is 4294967296", "between 0 and"]),
        ("train train.length=33", ["train.length is 33", "32"]),
        ("train train.weight_decay=-1", ["train.weight_decay is -1", "0 or more"]),
        ("train train.warmup_share=2", ["train.warmup_share is 2", "between 0 and 1"]),
        ("train train.precision=fp8", ["train.precision", "'fp8'", "bf16"]),
        ("train train.sharing=stolen", ["train.sharing", "'stolen'", "sliced"]),
        ("train train.batch=1000000000000", ["1000000000000 rows", "train.batch"]),
        ("train train.recipe=secret", ["train.recipe", "'secret'", "mixed, sandwich"]),
        ("train train.recipe=sandwich train.vectors_per_text=3", ["vectors_per_text is 3", "train.batch, 4"]),
        (
            "train train.largest_share=0.8 train.smallest_share=0.3",
            ["largest_share 0.8", "smallest_share 0.3", "lower"],
        ),
        ("train train.largest_first=1.5", ["train.largest_first is 1.5", "between 0 and 1"]),
        ("train train.distillation_temperature=0", ["train.distillation_temperature is 0", "positive"]),
        ("train train.accumulate=3", ["4 texts", "3 microbatches", "train.accumulate"]),
        ("train train.parallel=pipeline", ["train.parallel", "'pipeline'", "fsdp"]),
        ("fidelity supernet=nowhere", ["nowhere", "finished run"]),
        ("search train.steps=[1", ["train.steps", "'[1'"]),
        ("fidelity supernet=x vectors=1", ["vectors is 1", "two or more"]),
        ("fidelity supernet=x vectors=8", ["equal_total is 12 of 8 vectors", "raise vectors"]),
        ("fidelity supernet=x alone.vectors=25", ["alone.vectors 25", "among the others"]),
        ("fidelity supernet=x alone.seeds=[-1]", ["alone.seeds is [-1]", "0 or more"]),
        ("fidelity supernet=x further.steps=0", ["further.steps is 0", "positive"]),
        ("train name=", ["name", "''"]),
        ("train name=..", ["name", "'..'"]),
        (f"train name={'n' * 300}", ["too long", "name="]),
        ("train runs_dir=text.txt", ["text.txt", "runs_dir="]),
    ],
)
def test_a_wrong_value_is_named_together_with_its_mend(refused: Refused, command: str, words: list[str]) -> None:
    stage, *given = command.split()
    refused([stage, *DEFAULTS[stage], *given], words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian", ["'trian'", "train, measure, search"]),
        ("train data=books", ["data/books", "hf, stdlib, text"]),
        ("train +train.setps=3", ["no key train.setps", "--help"]),
        ("search +budgte=3", ["no key budgte", "--help"]),
        ("train data=text", ["data.path is needed"]),
        ("search sampler=cmaes", ["sampler/cmaes", "exhaustive, front, nsga2, random, tpe"]),
        ("export run=x export=gguf", ["export/gguf", "hf"]),
        ("report", ["run is needed"]),
        ("export", ["run is needed"]),
        ("finetune", ["checkpoint is needed"]),
        ("report run=nowhere", ["nowhere", "does not exist"]),
        ("export run=nowhere", ["nowhere", "is not a run directory"]),
        ("finetune checkpoint=nowhere", ["nowhere", "does not exist", "nas export"]),
        ("finetune checkpoint=.", ["config.json", "nas export"]),
        ("finetune checkpoint=text.txt", ["text.txt", "nas export"]),
    ],
)
def test_a_missing_or_unknown_part_is_named_together_with_its_mend(
    refused: Refused, command: str, words: list[str]
) -> None:
    refused(command.split(), words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run graphs")
def test_a_graph_is_refused_on_a_cpu(refused: Refused) -> None:
    refused(["measure", *DEFAULTS["measure"], "workload.runtime=graph"], ["workload.runtime=graph", "GPU", "eager"])


@pytest.mark.parametrize("arguments", [["trian.steps=3"], ["--bad"], ["a b=3"], ["sampler.flavour=1"]])
def test_hydras_usage_errors_exit_with_2(nas: Nas, arguments: list[str]) -> None:
    outcome = nas("search", *arguments)
    assert outcome.code == 2
    assert outcome.err and "Traceback" not in outcome.err


@pytest.mark.usefixtures("files")
def test_a_bad_run_of_a_sweep_does_not_stop_the_others(nas: Nas, tmp_path: Path) -> None:
    outcome = nas("train", "-m", *DEFAULTS["train"], "train.sharing=stolen,sliced", "name=sweep")
    check_refusal(outcome, ["'stolen'"])
    assert [mark.parent.name for mark in tmp_path.rglob("complete.json")] == ["train.sharing-sliced"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[1, 2, 4]", "[1, 3]", ["3", "layer 0", "1, 2, 4"]),
        ("[1, 2, 4]", "[]", ["kv_groups is []", "list"]),
        ("[1, 2, 4]", "4", ["kv_groups is 4", "list"]),
        ("[1, 2, 4]", "[1, two]", ["'two'", "whole numbers"]),
        ("[1, 2, 4]", "[1, [2]]", ["[2]", "whole numbers"]),
        ("[1, 2, 4]", "[[1], [1, [2]], [1]]", ["[2]", "whole numbers"]),
        ("[1, 2, 4]", "[[1], [2]]", ["2 layers", "num_hidden_layers is 3"]),
        ("head_dim: 8\n", "", ["head_dim is missing", "add it"]),
        ("head_dim: 8\n", "head_dim: 8\ncolour: red\n", ["unknown key colour", "num_hidden_layers"]),
        ("head_dim: 8\n", "head_dim: 8\n1: red\n", ["unknown key 1", "num_hidden_layers"]),
        ("head_dim: 8\n", "head_dim: 7\n", ["head_dim is 7", "even"]),
        ("hidden_size: 32\n", "hidden_size: wide\n", ["hidden_size is 'wide'", "positive integer"]),
        ("hidden_size: 32\n", "hidden_size: -32\n", ["hidden_size is -32", "positive integer"]),
        ("4-1-2", "4-1", ["favourite", "4-1 has 2 layers", "3"]),
        ("4-1-2", "4-1-3", ["favourite", "3 groups in layer 2", "1, 2, 4"]),
        ("favourite: 4-1-2", "- 4-1-2", ["known_vectors", "by name"]),
        ("[1, 2, 4]", "[1, 2", ["not valid YAML", "kv_groups"]),
        (MICRO, "words", ["not a mapping", "shipped"]),
        (MICRO, "", ["not a mapping", "shipped"]),
    ],
)
def test_a_wrong_space_is_named_together_with_its_mend(
    refused: Refused, tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    assert old in MICRO
    (tmp_path / "mine.yaml").write_text(MICRO.replace(old, new))
    refused(["measure", "space=mine.yaml", *TIMING], ["mine.yaml", *words])


def test_a_space_that_is_not_text_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    refused(["measure", "space=mine.yaml"], ["mine.yaml", "not valid YAML"])


@pytest.mark.parametrize("command", ["train", "measure", "search device=nvidia-a10g"])
def test_a_space_that_is_too_large_is_refused_before_any_text_is_read(
    refused: Refused, tmp_path: Path, command: str
) -> None:
    (tmp_path / "huge.yaml").write_text(MICRO.replace("intermediate_size: 256", "intermediate_size: 1000000000000"))
    refused([*command.split(), "space=huge.yaml"], ["huge", "GiB", "smaller space"])
    assert not (tmp_path / "runs" / "cache").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.txt", b"", ["t.txt", "no text"]),
        ("t.txt", b" \n\n", ["t.txt", "no text"]),
        ("t.txt", b"too little", ["320 tokens", "more text"]),
        ("t.txt", b"caf\xe9 " * 1000, ["t.txt", "UTF-8", "convert it"]),
        ("t.md", b"text", ["t.md", ".txt or .jsonl"]),
        ("t.txt.zip", b"text", ["t.txt.zip", ".txt or .jsonl"]),
        ("t.jsonl", b"\n\n", ["t.jsonl", "no text"]),
        ("t.jsonl", b'{"text": "a"}\n{"words": "b"}\n', ["t.jsonl line 2", "'text'", "data.text_key"]),
        ("t.jsonl", b'{"text": "a"}\nnot JSON\n', ["t.jsonl line 2", "'text'"]),
        ("t.jsonl", b'["text"]\n', ["t.jsonl line 1", "'text'"]),
        ("t.jsonl", b'{"text": 3}\n', ["t.jsonl line 1", "'text'"]),
        ("t.jsonl", b'{"text": "\\ud800"}\n', ["t.jsonl line 1", "'text'"]),
    ],
)
def test_a_wrong_text_is_named_together_with_its_mend(
    refused: Refused, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(["train", *DEFAULTS["train"], f"data.path={name}"], words)


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/", "empty", "*.text"])
def test_a_path_without_text_is_refused(refused: Refused, tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    refused(["train", *DEFAULTS["train"], f"data.path={path}"], [f"'{path}'", ".txt or .jsonl", "check it"])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.compress), ("bz2", bz2.compress)],
)
@pytest.mark.parametrize("damage", [halved, to("never packed")])
def test_a_damaged_packed_text_is_refused(
    refused: Refused, tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]
) -> None:
    content = (tmp_path / "text.txt").read_bytes()
    (tmp_path / f"t.txt.{suffix}").write_bytes(damage(pack(content)))
    refused(
        ["train", *DEFAULTS["train"], f"data.path=t.txt.{suffix}"], [f"t.txt.{suffix} cannot be read", "restore it"]
    )


@pytest.mark.parametrize(
    ("name", "content", "argument", "words"),
    [
        ("a.jsonl", '{"words": "a"}\n', "data.split=train", ["'text'", "words", "data.text_key"]),
        ("a.jsonl", '{"text": 3}\n', "data.split=train", ["3", "'text'", "data.text_key"]),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "data.split=train", ["None", "'text'", "data.text_key"]),
        ("a.jsonl", '{"text": "a"}\n', "data.split=test", ["test", "data.*"]),
        ("a.jsonl", '{"text": "a"}\n', "data.max_mb=0", ["data.max_mb is 0", "above zero"]),
        ("a.jsonl", '{"text": "a"}\n', "data.max_mb=lots", ["data.max_mb is 'lots'", "above zero"]),
        ("a.jsonl", "not JSON\n", "data.split=train", ["cannot be read", "data.*"]),
        ("a.parquet", "not parquet", "data.split=train", ["cannot be read", "data.*"]),
        ("a.md", "no data", "data.split=train", ["cannot be read", "data.*"]),
    ],
)
def test_a_wrong_dataset_is_named_together_with_its_mend(
    refused: Refused, tmp_path: Path, name: str, content: str, argument: str, words: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(content)
    refused(["train", "space=micro.yaml", "data=hf", "data.dataset=mine", argument, *TRAINING], words)


@pytest.mark.parametrize("content", [None, "{}", "not JSON", '{"model_type": "llama"}'])
def test_what_is_not_a_tokenizer_is_refused(refused: Refused, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    refused(["train", *DEFAULTS["train"], "tokenizer=t.json"], ["t.json", "tokenizer.json"])


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    refused: Refused, tmp_path: Path, workspace: Workspace
) -> None:
    tokenizer = only(workspace.runs, "train/*/tokenizer.json")
    (tmp_path / "small.yaml").write_text(MICRO.replace("vocab_size: 320", "vocab_size: 300"))
    arguments = ["train", *DEFAULTS["train"], "space=small.yaml", f"tokenizer={tokenizer}"]
    refused(arguments, [str(tokenizer), "320 tokens", "vocab_size is 300", "smaller tokenizer"])


def test_a_vocabulary_smaller_than_the_bytes_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(MICRO.replace("vocab_size: 320", "vocab_size: 200"))
    refused(["train", *DEFAULTS["train"], "space=small.yaml"], ["vocab_size is 200", "257", "tokenizer="])


def test_text_shorter_than_a_window_is_refused(refused: Refused, tmp_path: Path) -> None:
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "short.txt").write_text(text[:800])
    words = ["validation text", "window takes 33", "more text"]
    refused(["train", *DEFAULTS["train"], "data.path=short.txt"], words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export run=runs/search/base select=4-2", ["4-2 has 2 layers", "3"]),
        ("export run=runs/search/base select=4-2-3", ["3 groups in layer 2", "1, 2, 4"]),
        ("export run=runs/search/base select=4-x-2", ["'4-x-2'", "4-2-2-1"]),
        ("export run=runs/search/base select=nonsense", ["'nonsense'", "knee"]),
        ("export run={train}", ["nas train", "give a search run"]),
        ("export run={measure}", ["nas measure", "give a search run"]),
        ("report run={measure}", ["nas measure", "give a search run"]),
        ("report run=runs", ["written by 'nas measure'", "give a search run"]),
        ("report run=runs/cache", ["runs/cache", "holds no run"]),
        ("search latency={train}", ["nas train", "give a measure run"]),
        ("search supernet={measure}", ["nas measure", "give a train run"]),
        ("search latency={measure} workload.batch=7", ["{measure}", "batch 7", "measure that"]),
        ("search supernet={train} space=other.yaml", ["{train}", "space", "give the same space="]),
        ("search supernet={train} data.path=other.txt", ["{train}", "data", "give the same data="]),
        ("fidelity supernet={measure}", ["nas measure", "give a train run"]),
        ("fidelity supernet={train} data=text data.path=other.txt", ["{train}", "another text", "the same data="]),
        ("fidelity supernet={train} data=text data.path=text.txt vectors=28", ["vectors is 28", "27 vectors", "lower"]),
        ("search --budget 9 name=base", ["runs/search/base", "already finished", "name="]),
        ("finetune checkpoint={train}", ["{train}", "config.json", "nas export"]),
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
        ("search/base/complete.json", None, "export run=runs/search/base", ["unfinished", "name=base"]),
        ("search/base/complete.json", None, "report run=runs/search/base", ["unfinished", "name=base"]),
        ("search/base/complete.json", to("{"), "report run=runs/search/base", ["complete.json", "restore it"]),
        ("search/base/complete.json", to('{"artifacts": 1}'), "report run=runs/search/base", ["complete.json"]),
        ("search/base/run.json", to('{"stage": "search"}'), "report run=runs/search/base", ["run.json", "restore it"]),
        ("search/base/run.json", to('{"stage": "search"}'), "export run=runs/search/base", ["run.json", "restore it"]),
        ("search/base/trials.csv", flipped, "export run=runs/search/base", ["trials.csv is corrupt", "restore it"]),
        ("search/base/trials.csv", flipped, "report run=runs/search/base", ["trials.csv is corrupt", "restore it"]),
        ("search/base/front.csv", flipped, "export run=runs/search/base", ["front.csv is corrupt", "restore it"]),
        ("search/base/front.csv", None, "export run=runs/search/base", ["front.csv is missing", "nas search"]),
        ("train/*/complete.json", None, "export run=runs/search/base", ["runs/train", "unfinished"]),
        ("train/*/supernet.safetensors", flipped, "export run=runs/search/base", ["supernet.safetensors is corrupt"]),
        ("train/*/supernet.safetensors", flipped, "search", ["supernet.safetensors is corrupt", "restore it"]),
        ("train/*/supernet.json", flipped, "search supernet={train}", ["supernet.json is corrupt", "restore it"]),
        ("train/*/tokenizer.json", flipped, "export run=runs/search/base", ["tokenizer.json is corrupt"]),
        ("measure/*/table.csv", flipped, "search latency={measure}", ["table.csv is corrupt", "restore it"]),
        ("measure/*/table.csv", None, "search latency={measure}", ["table.csv is missing", "nas measure"]),
        ("measure/*/latency.json", to("{}"), "search latency={measure}", ["latency.json is corrupt", "restore it"]),
        ("measure/*/check.csv", to("a\n1\n"), "search latency={measure}", ["check.csv is corrupt", "restore it"]),
        ("cache/tokens-*/train.npy", to(""), "search", ["runs/cache/tokens-", "corrupt", "remove that folder"]),
        ("cache/tokens-*/train.npy", None, "search", ["runs/cache/tokens-", "corrupt", "remove that folder"]),
        ("cache/tokens-*/meta.json", to("{}"), "search", ["runs/cache/tokens-", "corrupt", "remove that folder"]),
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


def test_a_name_that_another_process_uses_is_refused(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train" / "mine"
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        refused(["train", *DEFAULTS["train"], "name=mine"], ["runs/train/mine", "in use", "name="])


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


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("config.json", flipped, ["config.json is corrupt", "restore it"]),
        ("model.safetensors", flipped, ["model.safetensors is corrupt", "restore it"]),
        ("tokenizer.json", flipped, ["tokenizer.json is corrupt", "restore it"]),
        ("tokenizer.json", None, ["tokenizer.json is missing", "nas export"]),
    ],
)
def test_a_damaged_export_is_not_finetuned(
    refused: Refused, exported: Path, name: str, damage: Damage, words: list[str]
) -> None:
    harm(exported / name, damage)
    refused(["finetune", f"checkpoint={exported}", *TEXT], words)


def set_config(**values: Any) -> Damage:
    """Damage that changes keys of a JSON file."""
    return lambda content: json.dumps(json.loads(content) | values).encode()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", halved, ["corrupt", "export it again"]),
        ("model.safetensors", to(""), ["corrupt", "export it again"]),
        ("model.safetensors", None, ["no model.safetensors", "export it again"]),
        ("tokenizer.json", None, ["tokenizer.json"]),
        ("config.json", to("{"), ["config.json", "restore it"]),
        ("config.json", set_config(model_type="llama"), ["'llama'", "nemotron-nas"]),
        ("config.json", to('{"model_type": "nemotron-nas"}'), ["corrupt", "export it again"]),
        ("config.json", set_config(num_hidden_layers=5), ["corrupt", "block_configs", "export it again"]),
        ("config.json", set_config(hidden_size=64), ["corrupt", "size mismatch", "export it again"]),
        ("config.json", set_config(hidden_size="wide"), ["corrupt", "hidden_size", "export it again"]),
        (
            "config.json",
            set_config(block_configs=3 * [{"attention": {"n_heads_in_group": 0}}]),
            ["corrupt", "export it again"],
        ),
    ],
)
def test_a_damaged_model_from_elsewhere_is_not_finetuned(
    refused: Refused, exported: Path, tmp_path: Path, name: str, damage: Damage, words: list[str]
) -> None:
    shutil.copytree(exported, tmp_path / "elsewhere")
    harm(tmp_path / "elsewhere" / name, damage)
    refused(["finetune", "checkpoint=elsewhere", *TEXT], ["elsewhere", *words])


def test_finetuning_one_of_several_exports_needs_a_choice(refused: Refused, exported: Path) -> None:
    shutil.copytree(exported, exported.with_name("second"))
    refused(["finetune", f"checkpoint={exported.parent}", *TEXT], ["2 models", f"{exported.parent}/"])


def test_a_diverged_training_keeps_its_last_good_checkpoint(refused: Refused, tmp_path: Path) -> None:
    given = ["train.learning_rate=1e30", "train.warmup_share=0", "train.checkpoint_every=1", "name=mine"]
    words = ["no longer finite", "lower train.learning_rate (now 1e+30)", "kept in runs/train/mine/checkpoint.pt"]
    refused(["train", *DEFAULTS["train"], *given], words)
    kept = torch.load(tmp_path / "runs/train/mine/checkpoint.pt", weights_only=True)
    assert kept["step"] >= 1
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_a_training_that_diverges_before_a_checkpoint_is_due_says_so(refused: Refused, tmp_path: Path) -> None:
    given = ["train.learning_rate=1e30", "train.warmup_share=0", "train.checkpoint_every=100", "name=mine"]
    refused(["train", *DEFAULTS["train"], *given], ["lower train.learning_rate", "no checkpoint was due"])
    assert not (tmp_path / "runs/train/mine/checkpoint.pt").exists()


@pytest.mark.parametrize("damage", [to(""), to("no checkpoint"), halved, flipped])
def test_a_damaged_checkpoint_is_refused_when_training_goes_on(
    nas: Nas, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage
) -> None:
    command = ["train", *DEFAULTS["train"], "name=mine"]
    with monkeypatch.context() as patch:  # stops the training after its last checkpoint
        patch.setattr("nas.stages.train.save_supernet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert nas(*command).code == 1
    harm(tmp_path / "runs/train/mine/checkpoint.pt", damage)
    refused(command, ["runs/train/mine/checkpoint.pt is corrupt", "remove it", "start this run over"])


def interrupted(arguments: Sequence[str], cwd: Path, due: Callable[[], bool]) -> Outcome:
    """Starts a command and presses Ctrl-C as soon as ``due``."""
    command = [sys.executable, "-m", "nas", *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not due():
        assert process.poll() is None, "the command ended before it could be interrupted"
        assert time.monotonic() < deadline, "the command never got that far"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, err)


@pytest.mark.usefixtures("files")
def test_ctrl_c_during_training_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train" / "mine"
    arguments = ["train", *DEFAULTS["train"], "train.steps=100000", "name=mine"]
    outcome = interrupted(arguments, tmp_path, lambda: bool(read_metrics(folder)))
    check_refusal(outcome, ["interrupted", "same command", "name=mine"])
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
    monkeypatch.setattr("nas.stages.train.train_supernet", swallow)
    refused(["train", *DEFAULTS["train"], "name=mine"], ["interrupted", "same command", "name=mine"])


@pytest.mark.usefixtures("files")
def test_a_full_disk_stops_a_training_that_then_goes_on(nas: Nas, tmp_path: Path) -> None:

    def fill_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    arguments = ["train", *DEFAULTS["train"], "name=mine"]
    command = [sys.executable, "-m", "nas", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=fill_disk)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    check_refusal(outcome, ["cannot write runs/train/mine/checkpoint.pt", "free some space", "same command again"])
    assert not (tmp_path / "runs/train/mine/complete.json").exists()
    assert nas(*arguments).code == 0


@pytest.mark.parametrize(
    ("size", "command", "words"),
    [
        (2_000, "train", ["tokenizer.json"]),
        (20_000, "train", ["train.npy"]),
        (300_000, "train train.checkpoint_every=100", ["supernet.safetensors"]),
        (6_000, "measure", ["samples.csv"]),
    ],
)
def test_a_full_disk_is_named_whichever_library_meets_it(
    refused: Refused, size: int, command: str, words: list[str]
) -> None:
    stage, *given = command.split()
    with file_size_limit(size):
        refused([stage, *DEFAULTS[stage], *given], ["cannot write runs/", *words, "free some space"])


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
def test_what_the_system_refuses_is_named_together_with_its_mend(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("nas.stages.measure.measure_space", fail)
    refused(["measure", *DEFAULTS["measure"]], ["some/file", os.strerror(number), fix])


def test_a_fault_of_the_system_that_no_user_can_mend_keeps_its_traceback(
    nas: Nas, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("nas.stages.measure.measure_space", fail)
    with pytest.raises(OSError, match="Input/output"):
        nas("measure", "space=tiny")


def test_a_gpu_without_enough_memory_is_named_together_with_its_mend(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nas.training.text.distilled_loss", fail)
    refused(["train", *DEFAULTS["train"]], ["4 rows", "memory", "lower train.batch"])


def test_an_unreadable_table_of_numbers_is_not_taken_for_tokens(refused: Refused, workspace: Workspace) -> None:
    np.save(only(workspace.runs, "cache/tokens-*/train.npy"), np.array([None]), allow_pickle=True)
    refused(["search", *workspace.arguments], ["runs/cache/tokens-", "corrupt", "remove that folder"])
