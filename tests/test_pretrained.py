"""Supernets that start from a trained Hugging Face checkpoint, with transformers as the reference."""

import copy
import dataclasses
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from nas.config import InitConfig, SupernetConfig, Train, TrainConfig
from nas.data.batches import validation_windows
from nas.data.tokenizer import train_tokenizer
from nas.errors import UserError
from nas.export.hf import HfExporter
from nas.export.modelopt import ModelOptExporter
from nas.files import read_json
from nas.model import Decoder, Supernet
from nas.model.pretrained import Checkpoint, read_checkpoint, resolve_space
from nas.model.sharing import SHARING_RULES, pooling
from nas.model.supernet import load_supernet
from nas.quality import mean_loss, vector_losses
from nas.run import FinishedRun, Run
from nas.shape import ModelShape
from nas.space import SearchSpace, space_from_dict
from nas.stages.train import Training, find_supernet, load_checkpoint, supernet_identity
from nas.training.loop import fit
from nas.training.recipes import text_loss
from tests import two_processes
from tests.conftest import FAST, Nas, logits_at
from tests.helpers import LLAMA3, TEXT, TRAINING, check_refusal

INIT = ("init=model", "init.calibration_tokens=160", "train.output_rank=2")
ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "data" / "stories260K"

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5,
}
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": (LlamaConfig, {"head_dim": 10, "rope_theta": 500.0}),
    "llama-linear": (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama-llama3": (LlamaConfig, {"rope_theta": 500.0, "rope_scaling": LLAMA3}),
    "mistral": (MistralConfig, {"sliding_window": 41, "rope_theta": 1e6}),
    "mistral-no-window": (MistralConfig, {"sliding_window": None}),
    "mistral-short-window": (MistralConfig, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-yarn": (
        Qwen2Config,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}},
    ),
    "qwen2-some-windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-biases": (Qwen3Config, {"head_dim": 8, "attention_bias": True}),
}


def save_checkpoint(
    folder: Path, kind: str = "llama", seed: int = 0, shards: str | None = None, **changes: Any
) -> Path:
    """A checkpoint of random weights, large enough for every part to count, in a folder of its own."""
    config_type, own = KINDS[kind]
    torch.manual_seed(seed)
    values = copy.deepcopy(SIZES | own | changes)  # transformers writes into rope_scaling
    model = AutoModelForCausalLM.from_config(config_type(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every kind."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)


def started(source: Checkpoint, sharing: str, space: SearchSpace | None = None) -> Supernet:
    """A supernet that has taken over a checkpoint."""
    supernet = Supernet(space or source.space(), sharing)
    source.load_into(supernet)
    return supernet.eval()


def of_groups(source: Checkpoint, *groups: int) -> SearchSpace:
    """The space of a checkpoint with these groups in every layer."""
    return dataclasses.replace(source.space(), choices=(groups,) * source.shape.num_hidden_layers)


@torch.no_grad()
def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes."""
    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(tokens).logits
    return logits


def some_tokens(rows: int, length: int) -> torch.Tensor:
    """Random tokens, always the same."""
    return torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_computed(folder: Path) -> None:
    """Asserts that a checkpoint is, as a supernet's largest vector, what transformers computes."""
    supernet, tokens = started(read_checkpoint(folder), "sliced"), some_tokens(1, 20)
    logits = logits_at(supernet, tokens, [supernet.space.largest])
    torch.testing.assert_close(logits, reference_logits(folder, tokens), atol=1e-4, rtol=1e-4)


def test_the_largest_vector_computes_what_the_checkpoint_computes_by_every_sharing_rule(checkpoint: Path) -> None:
    source = read_checkpoint(checkpoint)
    tokens = some_tokens(2, source.shape.max_position_embeddings)
    expected = reference_logits(checkpoint, tokens)
    assert expected.std() > 0.5
    for sharing in SHARING_RULES:
        supernet = started(source, sharing)
        with torch.no_grad():
            logits = logits_at(supernet, tokens, [supernet.space.largest] * 2)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            smaller = logits_at(supernet, tokens, [supernet.space.smallest] * 2)
        assert (smaller - expected).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "window"), [("mistral-short-window", 16), ("qwen2-some-windows", 12)])
def test_the_context_is_cut_to_a_sliding_window_and_that_is_said(
    kind: str, window: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tmp_path / kind, kind)
    assert read_checkpoint(folder).shape.max_position_embeddings == window
    said = capfd.readouterr().out
    assert f"sliding window of {window} tokens" in said
    assert "40" in said
    tokens = some_tokens(1, 40)
    whole = json.loads((folder / "config.json").read_text()) | {"sliding_window": 100}
    with_window = reference_logits(folder, tokens)
    (folder / "config.json").write_text(json.dumps(whole))
    without = reference_logits(folder, tokens)
    torch.testing.assert_close(with_window[:, :window], without[:, :window])
    assert (with_window - without).abs().max() > 0.01  # beyond it the window does count


def test_a_window_no_shorter_than_the_context_cuts_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = read_checkpoint(save_checkpoint(tmp_path / "mistral", "mistral"))
    assert source.shape.max_position_embeddings == 40
    assert "window" not in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["llama-biases", "qwen3-biases"])
@pytest.mark.parametrize("sharing", SHARING_RULES)
def test_more_heads_than_the_largest_choice_become_means_of_neighbours(kind: str, sharing: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "eight", kind, num_key_value_heads=8)
    source = read_checkpoint(folder)
    supernet = started(source, sharing, of_groups(source, 1, 2, 4))
    pooled = AutoModelForCausalLM.from_config(KINDS[kind][0](**(SIZES | KINDS[kind][1]))).eval()
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.unflatten(0, (4, 2, -1))  # four pairs of neighbours
            state[name] = heads.mean(1).flatten(0, 1)
    pooled.load_state_dict(state)
    tokens = some_tokens(2, 20)
    with torch.no_grad():
        logits = logits_at(supernet, tokens, [(4, 4, 4)] * 2)
        torch.testing.assert_close(logits, pooled(tokens).logits, atol=1e-4, rtol=1e-4)


def test_separate_heads_of_a_smaller_choice_are_means_of_all_heads(tmp_path: Path) -> None:
    source = read_checkpoint(save_checkpoint(tmp_path / "eight", num_key_value_heads=8))
    own = load_file(source.folder / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    supernet = started(source, "separate", of_groups(source, 1, 2, 4))
    extracted = supernet.extract((1, 2, 4)).state_dict()["model.layers.1.self_attn.v_proj.weight"]
    expected = torch.einsum("gc,cdi->gdi", pooling(8, 2), own.unflatten(0, (8, -1))).flatten(0, 1)
    torch.testing.assert_close(extracted, expected)


@pytest.mark.parametrize(
    ("heads", "groups"),
    [
        *[(2, (1, 2)), (3, (1, 3)), (4, (1, 2, 4)), (7, (1, 7)), (8, (1, 2, 4, 8)), (9, (1, 3, 9))],
        *[(12, (1, 2, 3, 4, 6, 12)), (16, (1, 2, 4, 8, 16))],
    ],
)
def test_the_derived_space_allows_the_divisors_of_the_heads(
    heads: int, groups: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "some-model"
    save_checkpoint(folder, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=4 * heads)
    space = resolve_space(str(folder))
    assert space.name == "some-model"
    assert space.choices == (groups,) * 3
    assert space_from_dict(space.name, json.loads(json.dumps(space.to_dict()))) == space


LLAMA32 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {  # config.json, the shape's, groups
    "SmolLM2-360M": (
        {"model_type": "llama", "hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5}
        | {"rope_theta": 100000, "rope_interleaved": False, "rope_scaling": None, "tie_word_embeddings": True},
        {"head_dim": 64, "rope_theta": 100000, "rope_scaling": None, "tie_word_embeddings": True},
        (1, 5),
    ),
    "Llama-3.2-1B": (
        {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 64, "max_position_embeddings": 131072, "pretraining_tp": 1, "attention_bias": False}
        | {"rope_theta": 500000.0, "rope_scaling": {**LLAMA32, "rope_type": "llama3"}, "tie_word_embeddings": True},
        {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", **LLAMA32}, "qkv_bias": False},
        (1, 2, 4, 8),
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 10000.0, "torch_dtype": "bfloat16"},
        {"max_position_embeddings": 4096, "head_dim": 128, "qkv_bias": False},
        (1, 2, 4, 8),
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 21, "use_mrope": False}
        | {"use_sliding_window": False, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": True},
        {"max_position_embeddings": 32768, "head_dim": 64, "qkv_bias": True, "o_bias": False, "rms_norm_eps": 1e-6},
        (1, 2),
    ),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128, "attention_bias": False, "max_position_embeddings": 40960, "sliding_window": None}
        | {"use_sliding_window": False, "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": True},
        {"head_dim": 128, "qk_norm": True, "qkv_bias": False, "max_position_embeddings": 40960},
        (1, 2, 4, 8),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_are_published_are_understood(name: str, tmp_path: Path) -> None:
    config, expected, groups = PUBLISHED[name]
    (tmp_path / name).mkdir()
    rest = {"hidden_act": "silu", "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000}
    (tmp_path / name / "config.json").write_text(json.dumps(rest | config))
    save_file({"unread": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    space = resolve_space(str(tmp_path / name))
    assert {key: getattr(space.shape, key) for key in expected} == expected
    assert (space.name, space.choices) == (name, (groups,) * 2)


NVIDIA = {  # as in nvidia/Llama-3_1-Nemotron-51B-Instruct and its successors, but for the sizes
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": None,
    "num_key_value_heads": None,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {**LLAMA32, "original_max_position_embeddings": 32, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 300,
}
ATTENTION = {"no_op": False, "replace_with_linear": False, "sparsify": None, "window_length": None}
ATTENTION |= {"num_sink_tokens": None, "unshifted_sink": False, "use_prefill_window_in_sink_attention": False}
FFN = {"ffn_mult": 5.25, "no_op": False, "replace_with_linear": False, "sparsify": None}
NEWER = {"no_op": False, "intermediate_size": 256, "gated": True, "hidden_act": "silu", "moe": None}


def save_blocks(folder: Path, ffn: Mapping[str, Any] = FFN, change: Any = None, **config: Any) -> Decoder:
    """A checkpoint in NVIDIA's form, of 4, 2 and 1 K/V heads and FFNs of 256; ``change`` is of the second layer."""
    blocks: list[dict[str, Any]] = [
        {"attention": ATTENTION | {"n_heads_in_group": group}, "ffn": dict(ffn)} for group in (2, 4, 8)
    ]
    for part, values in (change or {}).items():
        blocks[1][part] = blocks[1].get(part, {}) | values if isinstance(values, dict) else values
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NVIDIA | {"block_configs": blocks} | config))
    rope = {"rope_type": "llama3", **LLAMA32, "original_max_position_embeddings": 32}
    shape = ModelShape(3, 64, 8, 8, 256, 300, 128, rms_norm_eps=1e-6, rope_theta=500000.0, rope_scaling=rope)
    model = Decoder(shape, (4, 2, 1))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    stored = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("ffn", [FFN, NEWER], ids=["ffn_mult", "intermediate_size"])
@torch.no_grad()
def test_nvidias_models_are_read_layer_by_layer(ffn: Mapping[str, Any], tmp_path: Path) -> None:
    model, tokens = save_blocks(tmp_path / "nvidia", ffn), some_tokens(2, 40)
    read = HfExporter().read(tmp_path / "nvidia")
    assert (read.shape, read.kv_heads) == (model.shape, (4, 2, 1))
    assert torch.equal(read(tokens), model(tokens))
    source = read_checkpoint(tmp_path / "nvidia")
    space = source.space()
    assert space.choices == ((1, 2, 4), (1, 2), (1,))
    for text in (None, tokens):
        supernet = Supernet(space, "separate").eval()
        source.load_into(supernet, text, tmp_path)
        torch.testing.assert_close(logits_at(supernet, tokens, [(4, 2, 1)] * 2), model(tokens), atol=1e-3, rtol=1e-3)


def test_modelopts_dialect_is_read_layer_by_layer(tmp_path: Path) -> None:
    model = save_blocks(tmp_path / "nvidia")
    ModelOptExporter().write(model, None, tmp_path / "modelopt", {})
    read = HfExporter().read(tmp_path / "modelopt")
    assert (read.shape, read.kv_heads) == (model.shape, (4, 2, 1))
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention": {"no_op": True, "n_heads_in_group": None}}, "has no_op true in the attention of layer 1 "),
        ({"attention": {"replace_with_linear": True}}, "replace_with_linear true in the attention of layer 1 "),
        ({"attention": {"window_length": 512}}, "window_length 512 in the attention of layer 1 "),
        ({"attention": {"mamba": {"state_dim": 128}}}, 'mamba {"state_dim": 128} in the attention of layer 1 '),
        ({"ffn": {"no_op": True, "ffn_mult": None}}, "no_op true in the ffn of layer 1 "),
        ({"ffn": {"replace_with_linear": True, "ffn_mult": None}}, "replace_with_linear true in the ffn of layer 1 "),
        ({"ffn": {"gated": False}}, "gated false in the ffn of layer 1 "),
        ({"ffn": {"hidden_act": "gelu"}}, 'hidden_act "gelu" in the ffn of layer 1 '),
        ({"ffn": {"ffn_mult": 1.3125}}, "has FFNs of different widths (ffn_mult 1.3125 and 5.25 in block_configs)"),
        ({"parallel_blocks": [{}]}, "has parallel_blocks in layer 1 "),
        ({"attention": {"n_heads_in_group": 3}}, "config.json is not valid (n_heads_in_group does not divide"),
    ],
)
def test_what_our_decoder_does_not_have_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_blocks(tmp_path / "nvidia", change=change)
    for read in (HfExporter().read, read_checkpoint):
        with pytest.raises(UserError, match=re.escape(words)):
            read(tmp_path / "nvidia")


def test_quantised_weights_of_nvidias_are_refused(tmp_path: Path) -> None:
    save_blocks(tmp_path / "nvidia", quantization_config={"quant_method": "modelopt"})
    with pytest.raises(UserError, match="is quantised"):
        HfExporter().read(tmp_path / "nvidia")


def test_sharded_weights_are_read_and_hashed_as_a_whole(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "sharded", shards="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    check_computed(folder)
    before, changed = read_checkpoint(folder).identity, load_file(shards[-1])
    save_file({name: tensor + 1 for name, tensor in changed.items()}, shards[-1], metadata={"format": "pt"})
    after = read_checkpoint(folder).identity
    assert after["name"] == before["name"] == "sharded"
    assert after["hash"] != before["hash"]


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_head_that_is_stored_is_not_overwritten_although_the_config_says_tied(prefix: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "untied")
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("model.", prefix, 1): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert not read_checkpoint(folder).shape.tie_word_embeddings
    check_computed(folder)


@pytest.mark.parametrize("layout", ["only the head", "a base model", "a base model and a head"])
def test_tied_weights_are_found_under_whatever_names_they_were_saved(layout: str, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "tied", "llama-tied") / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    if layout == "only the head":
        del weights["model.embed_tokens.weight"]
    else:
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    head = {} if layout == "a base model" else {"lm_head.weight": embedding.clone()}
    save_file(weights | head, file, metadata={"format": "pt"})
    assert read_checkpoint(file.parent).shape.tie_word_embeddings
    check_computed(file.parent)


def test_weights_that_are_no_plain_numbers_are_refused(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "integers") / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, file, metadata={"format": "pt"})
    check_not_loaded(file.parent, ["model.norm.weight in int8", "give weights in fp32, bf16 or fp16"])


@pytest.fixture(scope="module")
def tokenizer(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([text_file.read_text()], 300).save(str(path))
    return path


def check_not_loaded(folder: Path, words: Sequence[str]) -> None:
    """Asserts that a checkpoint is refused with all the words, at the latest when its weights are read."""
    with pytest.raises(UserError) as refused:
        source = read_checkpoint(folder)
        source.load_into(Supernet(source.space()))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.fixture
def model(tmp_path: Path, text_file: Path, tokenizer: Path) -> Path:
    """A checkpoint with a tokenizer in the folder ``model`` of the working directory, beside a text.txt."""
    folder = save_checkpoint(tmp_path / "model", "qwen2")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (tmp_path / "text.txt").write_text(text_file.read_text()[:60_000])
    return folder


def test_the_whole_way_from_a_checkpoint_to_a_finetuned_vector(nas: Nas, model: Path) -> None:
    few = ("check=0", "measure.batches=[2]", "measure.contexts=[40]", "measure.prompts=[20]")
    arguments = (*INIT, *TEXT, *FAST, *few)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "temperature": 0.5}))
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "chat_template": "{{ messages }}"}))
    trained = nas("train", *INIT, *TEXT, *TRAINING, "name=mine")
    assert trained.code == 0, trained.err
    run = FinishedRun(Path("runs/train/mine"), "train")
    aligned = {"align": "auto", "calibration_tokens": 160}
    assert run.config["init"] == read_checkpoint(model).identity | aligned
    assert run.config["train"]["trainable"] == "kv"
    assert run.config["space"]["name"] == "model"
    assert run.config["train"]["sharing"] == read_json(run.artifact("supernet.json"))["sharing"] == "separate"
    assert run.artifact("tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()

    assert find_supernet(Path("runs"), run.config)
    assert not find_supernet(Path("runs"), run.config | {"init": {**run.config["init"], "hash": "another"}})

    searched = nas("search", "--budget", 5, *arguments, "name=mine")
    assert searched.code == 0, searched.err
    assert "Supernet: runs/train/mine" in searched.out
    assert "Training" not in searched.out
    measured = FinishedRun(Path("runs/search/mine")).parent("latency")
    assert read_json(measured.artifact("latency.json"))["shape"]["qkv_bias"] is True

    exported = nas("export", "run=runs/search/mine", "select=all", "name=mine")
    assert exported.code == 0, exported.err
    front = pd.read_csv("runs/search/mine/front.csv").set_index("vector")
    assert {path.parent.name for path in Path("runs/export/mine").glob("*/config.json")} == set(front.index)
    folder = Path("runs/export/mine") / front.index[0]
    row, card = front.iloc[0], (folder / "README.md").read_text()
    for file in (folder / "config.json", folder / "generation_config.json"):
        assert read_json(file)["eos_token_id"] == [7, 8]
    assert read_json(folder / "generation_config.json")["temperature"] == 0.5
    assert read_json(folder / "tokenizer_config.json")["chat_template"] == "{{ messages }}"
    for words in (folder.name, f"{row['loss_nats']:.5f}", f"{row['decode_ms']:.4f}", "(measured)", "measured on"):
        assert words in card
    finetuned = nas("finetune", f"checkpoint={folder}", *TEXT, *TRAINING, "name=mine")
    assert finetuned.code == 0, finetuned.err
    before = float(finetuned.out.split(" before")[0].split()[-1])
    assert before == pytest.approx(row["loss_nats"], abs=1e-4)
    assert HfExporter().read(Path("runs/finetune/mine/model")).shape.qkv_bias
    kept = ("generation_config.json", "tokenizer_config.json")
    assert all(read_json(Path("runs/finetune/mine/model") / name) == read_json(folder / name) for name in kept)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    spoiled = nas("finetune", f"checkpoint={folder}", *TEXT, *TRAINING, "name=spoiled")
    check_refusal(spoiled, ["model.safetensors", "changed after the run finished"])

    named = nas("search", "--budget", 5, *arguments, "init.align=null", "supernet=runs/train/mine", "name=named")
    assert named.code == 0, named.err  # of the same checkpoint, whatever was made of its heads
    other = save_checkpoint(Path("other") / "model", "qwen2", seed=2)
    for name in ("tokenizer.json", *kept):
        (other / name).write_bytes((model / name).read_bytes())
    again = nas("search", "--budget", 5, *arguments, "init=other/model", "supernet=runs/train/mine", "name=wrong")
    check_refusal(again, ["runs/train/mine", "another init", "give the same init="])


@pytest.mark.usefixtures("model")
def test_models_trained_alone_start_from_the_supernets_checkpoint(nas: Nas) -> None:
    assert nas("train", *INIT, *TEXT, *TRAINING, "name=mine").code == 0
    counts = ("vectors=4", "equal_total=2", "further.steps=2", "alone.seeds=[0]", "alone.vectors=4", "alone.steps=1")
    command = ("fidelity", "supernet=runs/train/mine", *TEXT, *counts, "name=mine")
    check_refusal(nas(*command), ["runs/train/mine", "the checkpoint model", "init=", "alone.vectors=0"])
    other = save_checkpoint(Path("other") / "model", "qwen2", seed=2)
    check_refusal(nas(*command, f"init={other}"), ["the checkpoint model", "give the same init="])
    compared = nas(*command, "init=model")
    assert compared.code == 0, compared.err
    rows = pd.read_csv("runs/fidelity/mine/measurements.csv").query("kind == 'alone' and vector == '4-4-4'")

    trained = FinishedRun(Path("runs/train/mine"), "train").config["train"]
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    options = dataclasses.replace(TrainConfig(**{name: trained[name] for name in fields}), steps=1)
    tokens = {name: np.load(next(Path("runs").glob(f"cache/tokens-*/{name}.npy"))) for name in ("train", "validation")}
    supernet = Supernet(resolve_space("model"), "separate")
    supernet.decoder.load_state_dict(load_file("runs/train/mine/supernet.safetensors"), strict=False)
    plain = supernet.extract((4, 4, 4))  # which the training did not change
    length = plain.shape.max_position_embeddings
    Path("plain").mkdir()
    fit(plain, text_loss(tokens["train"], options, length), options, Run(Path("plain")), dict)
    windows = validation_windows(tokens["validation"], 256, length)
    assert rows["loss_nats"].item() == pytest.approx(mean_loss(plain.eval(), windows), abs=1e-6)


def test_training_goes_on_from_its_checkpoint_and_not_from_the_first_weights(
    nas: Nas, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", *INIT, *TEXT, *TRAINING, "train.learning_rate=1e-2")
    assert nas(*arguments, "name=whole").code == 0
    with monkeypatch.context() as patch:  # stops the training after its last checkpoint
        patch.setattr("nas.stages.train.save_supernet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert nas(*arguments, "name=cut").code == 1
    assert nas(*arguments, "name=cut").code == 0
    whole, cut = (load_file(f"runs/train/{name}/supernet.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    supernet = load_supernet(FinishedRun(Path("runs/train/whole"), "train"), torch.device("cpu"))
    tokens, largest = some_tokens(1, 20), supernet.space.largest
    with torch.no_grad():  # nothing of the largest vector was trained
        expected = reference_logits(model, tokens)
        torch.testing.assert_close(logits_at(supernet, tokens, [largest]), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(supernet.extract(largest)(tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("model")
def test_two_processes_start_from_the_checkpoint_as_one_does(nas: Nas, tmp_path: Path) -> None:
    arguments = (*INIT, *TEXT, *FAST[:2], "train.steps=2", "train.validation_windows=1")
    assert nas("train", *arguments, "name=one").code == 0
    sharded = [sys.executable, two_processes.__file__, "train", *arguments, "train.parallel=fsdp", "name=two"]
    subprocess.run(sharded, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    one, two = (load_file(f"runs/train/{name}/supernet.safetensors") for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.usefixtures("model")
def test_a_space_may_choose_other_groups_and_a_shorter_context(nas: Nas, tmp_path: Path) -> None:
    values = resolve_space("model").to_dict()
    own = values | {"kv_groups": [[1, 2], [4], [2, 4]], "max_position_embeddings": 24}
    (tmp_path / "mine.yaml").write_text(json.dumps(own))
    arguments = ("space=mine.yaml", "init=model", *TEXT, *TRAINING, "train.sharing=pooled", "name=mine")
    result = nas("train", *arguments)
    assert result.code == 0, result.err
    config = FinishedRun(Path("runs/train/mine")).config
    assert (config["space"]["name"], config["train"]["sharing"]) == ("mine", "pooled")


@pytest.mark.usefixtures("model")
def test_without_init_a_checkpoint_is_only_a_space_and_the_studied_rule_and_rate_are_taken(nas: Nas) -> None:
    result = nas("train", "space=model", "tokenizer=model", *TEXT, *TRAINING, "name=mine")
    assert result.code == 0, result.err
    config = FinishedRun(Path("runs/train/mine")).config
    assert (config["init"], config["train"]["sharing"], config["train"]["learning_rate"]) == (None, "sliced", 4e-3)
    assert config["space"] == {"name": "model", **resolve_space("model").to_dict()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt_neox"}, ["'gpt_neox'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": "smollm3"}, ["'smollm3'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["'None'", "llama, mistral, qwen2, qwen3"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5", "whole heads"]),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type 'dynamic'", "llama3, yarn"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["different rotary", "rope_parameters"]),
        ({"layer_types": ["full_attention"] * 2 + ["linear_attention"]}, ["linear_attention", "sliding"]),
        ({"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, ["chunked_attention", "sliding"]),
        ({"no_rope_layers": [1, 0, 1]}, ["no_rope_layers", "not supported"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised", "quantization_config"]),
        ({"num_key_value_heads": 3}, ["3 K/V heads", "8 heads"]),
        ({"num_key_value_heads": 1}, ["one K/V head", "nothing to choose"]),
        ({"num_key_value_heads": 8}, ["k_proj.bias has another shape than (32,)"]),
        ({"hidden_size": "wide"}, ["config.json is not valid", "restore it"]),
        ({"num_key_value_heads": 0}, ["config.json is not valid", "restore it"]),
        ({"hidden_size": 24}, ["config.json is not valid", "head_dim is 3", "even"]),
        ({"vocab_size": 310}, ["embed_tokens.weight has another shape than (310, 32)"]),
        ({"num_hidden_layers": 4}, ["model.layers.3", "is missing"]),
        ({"num_hidden_layers": 2}, ["model.layers.2", "has no place in the model"]),
    ],
)
def test_a_config_that_is_not_supported_or_does_not_fit_its_weights_is_refused(
    model: Path, change: Mapping[str, Any], words: list[str]
) -> None:
    config = json.loads((model / "config.json").read_text()) | {"layer_types": None} | change
    (model / "config.json").write_text(json.dumps(config))
    check_not_loaded(model, ["model", *words])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, ["model has no config.json", "Hugging Face"]),
        ("config.json", b"{", ["config.json", "restore it"]),
        ("config.json", b"[]", ["config.json", "restore it"]),
        ("model.safetensors", None, ["model.safetensors cannot be read", "safetensors", "download"]),
        ("model.safetensors", b"", ["model.safetensors cannot be read", "download them again"]),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", ["cannot be read", "download"]),
    ],
)
def test_a_damaged_checkpoint_is_refused(model: Path, name: str, content: bytes | None, words: list[str]) -> None:
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    check_not_loaded(model, words)


def test_a_checkpoint_that_cannot_be_trained_is_refused_before_any_text_is_read(nas: Nas, model: Path) -> None:
    command, config = ("train", "init=model", *TEXT, *TRAINING), json.loads((model / "config.json").read_text())
    weights, tokenizer = (model / "model.safetensors").read_bytes(), (model / "tokenizer.json").read_bytes()
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 290}))
    check_refusal(nas(*command), ["tokenizer.json", "300 tokens", "vocab_size is 290"])
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    check_refusal(nas(*command), ["model.safetensors cannot be read", "download them again"])
    (model / "model.safetensors").write_bytes(weights)
    (model / "tokenizer.json").write_bytes(tokenizer[:1])
    check_refusal(nas(*command), ["model/tokenizer.json", "cannot be read"])
    (model / "tokenizer.json").unlink()
    check_refusal(nas(*command), ["model/tokenizer.json", "give a tokenizer.json"])
    assert not Path("runs/cache").exists()


def test_weights_that_are_not_finite_are_refused(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    source = read_checkpoint(model)
    with pytest.raises(UserError, match=r"model.norm.weight has values that are not finite; restore it"):
        source.load_into(Supernet(source.space()))


def test_a_missing_shard_or_a_wrong_index_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "sharded", shards="40KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} cannot be read .* download them again"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_hidden_layers": 2, "kv_groups": [[1], [2]]},
            "num_hidden_layers 2 but checkpoint .* has 3; .*space=",
        ),
        ({"intermediate_size": 64}, "space mine has intermediate_size 64 but checkpoint .* has 48"),
        ({"max_position_embeddings": 80}, "space mine has max_position_embeddings 80 but checkpoint .* has 40"),
        ({"qkv_bias": False}, "space mine has qkv_bias False but checkpoint .* has True"),
        (
            {"kv_groups": [[4], [4, 8], [1]]},
            "8 groups in layer 1 but checkpoint .* has 4 K/V heads; .*kv_groups",
        ),
    ],
)
def test_a_space_that_does_not_fit_a_checkpoint_is_refused(model: Path, change: dict[str, Any], words: str) -> None:
    source = read_checkpoint(model)
    space = space_from_dict("mine", source.space().to_dict() | change)
    with pytest.raises(UserError, match=words):
        source.check_space(space)


def test_the_command_checks_init_and_space(nas: Nas, model: Path) -> None:
    (model.parent / "empty").mkdir()
    lack = "has no config.json"
    for given, why in (("init=nowhere", "does not exist"), ("init=text.txt", lack), ("space=empty", lack)):
        refused = nas("train", given, *TEXT, *TRAINING)
        check_refusal(refused, [f"checkpoint {given.partition('=')[2]} {why}", "Hugging Face"])
    unfit = nas("train", "init=model", "space=tiny", *TEXT, *TRAINING)
    check_refusal(unfit, ["space tiny has num_hidden_layers 8", "model has 3", "space="])
    strange = nas("train", "init=model", "init.align=yes", *TEXT, *TRAINING)
    check_refusal(strange, ["init.align is 'yes'", "use auto or null"])
    for given in ("space=tiny", "init=model train.sharing=pooled"):
        refused = nas("train", *given.split(), "train.trainable=kv", *TEXT, *TRAINING)
        check_refusal(refused, ["train.trainable is kv", "init=", "train.sharing=separate"])
    assert not Path("runs/cache").exists()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([1, 2], r"largest vector of space mine is not checkpoint .*model, which has 4 K/V heads .*kv_groups"),
        ([[1, 4], [2, 4], [1, 2]], "largest vector of space mine is not checkpoint"),
        ([4], "space mine has no smaller choices to train"),
    ],
)
def test_heads_are_trained_alone_only_where_the_largest_vector_is_the_checkpoint(
    model: Path, groups: list[Any], words: str
) -> None:
    file = model.parent / "mine.yaml"
    file.write_text(json.dumps(resolve_space(str(model)).to_dict() | {"kv_groups": groups}))

    def training(trainable: str) -> Training:
        init = InitConfig(checkpoint=str(model))
        return Training(Train(space=str(file), init=init, train=SupernetConfig(trainable=trainable)))

    assert training("auto").options.trainable == "all"
    with pytest.raises(UserError, match=f"train.trainable is kv, but .*{words}.*, or give train.trainable=all"):
        training("kv")


def test_supernets_that_were_trained_before_there_was_a_choice_of_weights_are_found_again() -> None:
    training = Training(Train(space="tiny"))
    space = {"name": "tiny", **training.space.to_dict()}
    chosen = dataclasses.asdict(training.options)
    now = {"space": space, "init": None, "data": {"digest": "some"}, "train": chosen}
    options = {key: value for key, value in chosen.items() if key != "trainable"}
    assert supernet_identity(now) == supernet_identity(now | {"train": options | {"distillation_weight": 0.5}})
    assert supernet_identity(now) != supernet_identity(now | {"train": options | {"distillation_weight": 0.7}})


def test_aligned_heads_are_kept_and_a_damaged_file_of_them_is_refused(model: Path, tmp_path: Path) -> None:
    source, text = read_checkpoint(model), some_tokens(2, 20)
    first, again = (Supernet(source.space(), "separate") for _ in range(2))
    source.load_into(first, text, tmp_path)
    source.load_into(again, text, tmp_path)
    assert all(torch.equal(tensor, again.get_parameter(name)) for name, tensor in first.named_parameters())
    file = next(tmp_path.glob("aligned-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{file.name} is corrupt \(.+\); remove it"):
        source.load_into(again, text, tmp_path)


@pytest.mark.parametrize(("wanted", "shape"), [(16, (1, 16)), (100, (3, 40))])
def test_text_for_calibration_is_no_longer_than_wanted_but_for_whole_rows(
    tmp_path: Path, wanted: int, shape: tuple[int, int]
) -> None:
    source, texts = read_checkpoint(save_checkpoint(tmp_path / "model")), []
    init = SimpleNamespace(load_into=lambda _, text, __: texts.append(text))
    recorded = {"init": {"align": "auto", "calibration_tokens": wanted}, "train": {"length": None, "seed": 0}}
    data = SimpleNamespace(train=np.arange(300, dtype=np.uint16))
    load_checkpoint(init, Supernet(source.space()), recorded, data, tmp_path)  # type: ignore[arg-type]
    assert [tuple(text.shape) for text in texts] == [shape]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the real checkpoint is not there: {STORIES}")
def test_a_real_checkpoint_keeps_its_loss(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "stories260k.py"))
    folder = script["convert"](STORIES, tmp_path / "stories260k")
    windows = script["as_windows"](folder, script["SAMPLE_TEXT"], 64)
    supernet = started(read_checkpoint(folder), "separate")
    ours = vector_losses(supernet, [supernet.space.largest], windows)[0]
    assert ours == pytest.approx(script["transformers_loss"](folder, windows), abs=1e-4)
    assert ours < 1.4  # it reads stories; a uniform guess costs 6.24 nats
