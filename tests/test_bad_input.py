"""Mistakes by the command line: exit code 1, one sentence that helps, and nothing that looks finished.

What a module refuses by itself is tested at that module, or in `test_what_is_wrong_is_named_where_it_is_decided`.
"""

import bz2
import errno
import gzip
import itertools
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

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard

from nas.config import Fidelity, SupernetConfig, WorkloadConfig, build
from nas.data import prepare_tokens, validation_windows
from nas.data.corpora import Corpus, HubCorpus, TextCorpus
from nas.data.tokenizer import load_tokenizer
from nas.errors import UserError, is_out_of_memory
from nas.export.hf import HfExporter
from nas.files import read_json
from nas.latency import find_device, resolve_workload, this_device
from nas.model import Supernet
from nas.model.pretrained import resolve_space
from nas.quality import InheritedLoss, LossMemo
from nas.space import SearchSpace, format_vector, load_space
from nas.stages import fidelity
from nas.stages.export import open_checkpoint
from nas.training import check_memory, window_length
from nas.training.recipes import check_recipe
from tests.conftest import FAST, MICRO, Nas, Outcome, Workspace, random_supernet, read_metrics
from tests.helpers import TEXT, TIMING, TRAINING, Damage, check_refusal, flipped, halved, harm, set_config, started, to

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
        ("trian", ["'trian'", "train, measure, search"]),
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
        ("measure device=nvidia-a10g", ["'nvidia-a10g'", "device=this"]),
        ("measure publish=text.txt", ["text.txt", "fix that path"]),
        ("search objectives=loss_nats", ["objectives", "list"]),
        ("search --budget -3", ["'-3'", "200", "30m"]),
        ("search +sampler.draws=-1", ["FrontSampler", "draws is -1", "at least 0"]),
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
        (lambda _: window_length(SupernetConfig(length=33), 32), ["train.length is 33", "32"]),
        (lambda space: Supernet(space, "stolen"), ["train.sharing", "'stolen'", "sliced"]),
        (
            lambda space: check_memory("it", SupernetConfig(batch=10**12), space.shape, space.largest),
            ["1000000000000 rows", "train.batch"],
        ),
        (lambda _: check_recipe(SupernetConfig(recipe="secret")), ["'secret'", "mixed, sandwich"]),
        (
            lambda _: check_recipe(SupernetConfig(recipe="sandwich", vectors_per_text=3, batch=4)),
            ["vectors_per_text is 3", "train.batch, 4"],
        ),
        (
            lambda _: check_recipe(SupernetConfig(largest_share=0.8, smallest_share=0.3)),
            ["largest_share 0.8", "smallest_share 0.3", "lower"],
        ),
        (lambda _: fidelity.run(Fidelity(vectors=1), Path("x")), ["vectors is 1", "two or more"]),
        (lambda _: fidelity.run(Fidelity(vectors=8), Path("x")), ["equal_total is 12 of 8 vectors", "raise vectors"]),
        (lambda _: open_checkpoint("nowhere", HfExporter()), ["nowhere", "does not exist", "nas export"]),
        (lambda _: open_checkpoint("", HfExporter()), ["config.json", "nas export"]),
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


@pytest.mark.parametrize("arguments", [["trian.steps=3"], ["--bad"], ["a b=3"], ["sampler=front,tpe"]])
def test_hydras_usage_errors_exit_with_2(nas: Nas, arguments: list[str]) -> None:
    outcome = nas("search", *arguments)
    assert outcome.code == 2
    assert outcome.err and "Traceback" not in outcome.err


def test_values_with_a_comma_are_told_from_a_sweep(nas: Nas) -> None:
    outcome = nas("train", "init=p/a,b")
    assert outcome.code == 2
    assert outcome.err == (
        "nas train: init=p/a,b is several values; quote a text with commas, 'init=\"p/a,b\"', or sweep with -m\n"
    )


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
        (MICRO, b"\xff\xfe\x00", ["not valid YAML"]),
        (MICRO, "", ["not a mapping", "shipped"]),
    ],
)
def test_a_wrong_space_is_named_with_its_fix(tmp_path: Path, old: str, new: str | bytes, words: list[str]) -> None:
    assert old in MICRO
    path = tmp_path / "mine.yaml"
    path.write_bytes(new if isinstance(new, bytes) else MICRO.replace(old, new).encode())
    with pytest.raises(UserError) as refusal:
        load_space(str(path))
    assert all(word in str(refusal.value) for word in ["mine.yaml", *words]), refusal.value


@pytest.mark.parametrize("command", ["measure", "search device=nvidia-a10g"])
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
def test_a_wrong_text_is_named_with_its_fix(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    refuse_text(tmp_path, TextCorpus(str(tmp_path / name)), words)


def refuse_text(folder: Path, corpus: Corpus, words: Sequence[str], vocabulary: int = 320) -> None:
    """Asserts that the tokens of a corpus, or validation windows of them, are refused as they should be."""
    with pytest.raises(UserError) as refusal:
        validation_windows(prepare_tokens(corpus, None, vocabulary, folder / "cache").validation, 4, 32)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/", "empty", "*.text"])
def test_a_path_without_text_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    refuse_text(tmp_path, TextCorpus(f"{tmp_path}/{path}"), [f"{path}'", ".txt or .jsonl", "check it"])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.compress), ("bz2", bz2.compress)],
)
@pytest.mark.parametrize("damage", [halved, to("never packed")])
def test_a_damaged_packed_text_is_refused(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / f"t.txt.{suffix}"
    file.write_bytes(damage(pack(bytes(range(256)) * 40)))
    refuse_text(tmp_path, TextCorpus(str(file)), [f"t.txt.{suffix} cannot be read", "restore it"])


@pytest.mark.parametrize(
    ("name", "content", "given", "words"),
    [
        ("a.jsonl", '{"words": "a"}\n', {}, ["'text'", "words", "data.text_key"]),
        ("a.jsonl", '{"text": 3}\n', {}, ["3", "'text'", "data.text_key"]),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', {}, ["None", "'text'", "data.text_key"]),
        ("a.jsonl", '{"text": "a"}\n', {"split": "test"}, ["test", "data.*"]),
        ("a.jsonl", '{"text": "a"}\n', {"max_mb": 0}, ["data.max_mb is 0", "above zero"]),
        ("a.jsonl", '{"text": "a"}\n', {"max_mb": "lots"}, ["data.max_mb is 'lots'", "above zero"]),
        ("a.jsonl", "not JSON\n", {}, ["cannot be read", "data.*"]),
        ("a.parquet", "not parquet", {}, ["cannot be read", "data.*"]),
        ("a.md", "no data", {}, ["cannot be read", "data.*"]),
    ],
)
def test_a_wrong_dataset_is_named_with_its_fix(
    tmp_path: Path, name: str, content: str, given: dict[str, Any], words: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(content)
    with pytest.raises(UserError) as refusal:
        list(HubCorpus(str(tmp_path / "mine"), **given).documents())
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("content", [None, "{}", "not JSON", '{"model_type": "llama"}'])
def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json.*tokenizer\.json"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    pristine: Workspace, text_file: Path, tmp_path: Path
) -> None:
    tokenizer = str(only(pristine.runs, "train/*/tokenizer.json"))
    with pytest.raises(UserError, match="320 tokens but the model's vocab_size is 300; give a smaller tokenizer"):
        prepare_tokens(TextCorpus(str(text_file)), tokenizer, 300, tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused(text_file: Path, tmp_path: Path) -> None:
    refuse_text(tmp_path, TextCorpus(str(text_file)), ["vocab_size is 200", "257", "tokenizer="], vocabulary=200)


def test_text_shorter_than_a_window_is_refused(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(text_file.read_text()[:800])
    refuse_text(tmp_path, TextCorpus(str(tmp_path / "short.txt")), ["validation text", "window takes 33", "more text"])


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_damaged_tokens_are_refused(text_file: Path, tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "t.txt").write_text(text_file.read_text()[:30_000])
    corpus = TextCorpus(str(tmp_path / "t.txt"))
    prepare_tokens(corpus, None, 320, tmp_path)
    harm(only(tmp_path, "tokens-*/train.npy"), content if content is None else lambda _: content)
    with pytest.raises(UserError, match=r"tokens-.*corrupt.*remove that folder"):
        prepare_tokens(corpus, None, 320, tmp_path)
    np.save(only(tmp_path, "tokens-*") / "train.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(UserError, match=r"tokens-.*corrupt.*remove that folder"):
        prepare_tokens(corpus, None, 320, tmp_path)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export run=runs/search/base select=nonsense", ["'nonsense'", "knee"]),
        ("export run={train}", ["nas train", "give a search run"]),
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


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", halved, ["corrupt", "export it again"]),
        ("model.safetensors", to(""), ["corrupt", "export it again"]),
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
def test_a_damaged_model_from_elsewhere_is_not_read(
    model: Path, tmp_path: Path, name: str, damage: Damage, words: list[str]
) -> None:
    shutil.copytree(model, tmp_path / "elsewhere")
    harm(tmp_path / "elsewhere" / name, damage)
    with pytest.raises(UserError) as refusal:
        HfExporter().read(tmp_path / "elsewhere")
    assert all(word in str(refusal.value) for word in ["elsewhere", *words]), refusal.value


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


@pytest.mark.usefixtures("files")
def test_ctrl_c_during_training_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train" / "mine"
    arguments = ["train", *DEFAULTS["train"], "train.steps=100000", "name=mine"]
    process = started(arguments, tmp_path, lambda: bool(read_metrics(folder)))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    check_refusal(Outcome(process.returncode, out, err), ["interrupted", "same command", "name=mine"])
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


def test_a_gpu_without_enough_memory_is_named_with_its_fix(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nas.training.text.distilled_loss", fail)
    refused(["train", *DEFAULTS["train"]], ["4 rows", "memory", "lower train.batch"])


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
        ("nas.quality.vector_losses", "search seed=1 budget=3", "lower workers, train.batch"),
        ("nas.stages.export.select", "export run=runs/search/base", "smaller space"),
        ("nas.stages.measure.measure", "measure space=micro.yaml", "lower workload.batch"),
    ],
)
def test_memory_that_runs_out_outside_a_training_step_is_one_sentence(
    refused: Refused, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, place: str, command: str, fix: str
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 3")

    for memo in workspace.runs.glob("cache/losses-*"):
        memo.unlink()
    monkeypatch.setattr(place, fail)
    refused(with_runs(command, workspace), ["memory ran out (CUDA out of memory)", fix, "machine with more"])
