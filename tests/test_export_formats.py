"""Formats beside Hugging Face's: each against what its reader computes, or against the reader's published rules."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nas.data.tokenizer import load_tokenizer
from nas.errors import UserError
from nas.export.card import _ENGINES
from nas.export.gguf import _WORDS, FILE, GgufExporter
from nas.export.hf import HfExporter
from nas.export.megatron import ARGUMENTS, LAYERS, MegatronExporter
from nas.export.modelopt import ModelOptExporter
from nas.export.uniform import UniformExporter
from nas.model import Decoder
from nas.shape import ModelShape
from nas.space import SearchSpace
from tests.conftest import Nas, Workspace, random_supernet
from tests.helpers import LINEAR, LLAMA3, YARN, check_refusal

ROOT = Path(__file__).parents[1]
TEXT = "def some(words):\n    return 12345 + 'more words, and some more'  # é ∑\n"
SHAPE = ModelShape(3, 64, 8, 16, 96, 400, 40)
FEATURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3": {"rope_scaling": LLAMA3, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2": {"rope_scaling": YARN, "qkv_bias": True, "tie_word_embeddings": True},
    "wide": {"rope_scaling": LINEAR, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "odd": {"qkv_bias": True, "mlp_bias": True},
}


def made(kind: str) -> Decoder:
    """A random model with layers of 4, 1 and 2 groups and these features."""
    shape = dataclasses.replace(SHAPE, **FEATURES[kind])
    model: Decoder = random_supernet(SearchSpace(kind, shape, ((1, 2, 4),) * 3)).extract((4, 1, 2))
    return model


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small tokenizer.json files of the kinds that llama.cpp knows, by its name."""
    folder, text = tmp_path_factory.mktemp("tokenizers"), [TEXT * 50, "\n".join(map(str, range(2000)))]
    before: dict[str, Any] = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS % r"\p{N}{1,3}"), "isolated"), None],
        "qwen2": [pre_tokenizers.Split(Regex(_WORDS % r"\p{N}"), "isolated"), None],
    }
    for name, steps in before.items():
        tokenizer = Tokenizer(models.BPE())
        if isinstance(steps, list):
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            steps = pre_tokenizers.Sequence([step or byte_level for step in steps])
        tokenizer.pre_tokenizer, tokenizer.decoder = steps, decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(text, trainer)
        tokenizer.save(str(folder / f"{name}.json"))

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names)
    tokenizer.train_from_iterator([TEXT.encode("ascii", "ignore").decode()] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    content["added_tokens"] = content["added_tokens"][:3]
    (folder / "llama.json").write_text(json.dumps(content))
    return {file.stem: file for file in folder.glob("*.json")}


def test_special_tokens_and_the_chat_template_of_a_checkpoint_are_in_both_formats(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(tokenizers["gpt-2"].read_bytes())
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": [5, 0]}')
    beside = {"add_bos_token": True, "chat_template": "{{ messages }}"}
    foreign = {"auto_map": {"AutoTokenizer": ["some/code.py", None]}, "extra_special_tokens": ["<x>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside | foreign))
    for exporter in (GgufExporter(), HfExporter()):
        exporter.write(made("llama"), tokenizer, tmp_path / "out", {})
    fields = gguf.GGUFReader(tmp_path / "out" / FILE).fields
    names = [f"ggml.{key}" for key in ("bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token")]
    found = [fields[f"tokenizer.{name}"].contents() for name in (*names, "chat_template")]
    assert found == [7, 5, 0, True, "{{ messages }}"]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config.items() >= beside.items()
    assert (config["additional_special_tokens"], config.keys() & foreign.keys()) == (["<x>"], set())


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "smollm"), ("llama-3", "llama-bpe"), ("qwen2", "qwen2"), ("wide", "llama")]
)
def test_llama_cpp_computes_the_same_tokens_log_probabilities_and_cache(
    kind: str, name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    model, tokenizer = made(kind), load_tokenizer(str(tokenizers[name]))
    GgufExporter().write(model, tokenizers[name], tmp_path, {})
    ids = torch.randint(1, 380, (1, 24), generator=torch.Generator().manual_seed(0))
    texts = [TEXT, "é ∑ 12345 x"]
    asked = {"prompts": [], "new": 1, "ids": ids[0].tolist(), "vocabulary": 400, "texts": texts}
    letter = next(token for token in ("a", "▁a") if tokenizer.token_to_id(token) is not None)
    (tmp_path / "asked.json").write_text(json.dumps(asked | {"letter": tokenizer.token_to_id(letter)}))
    command = [sys.executable, str(ROOT / "scripts/engine_run.py"), "llama.cpp without flash attention", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path / "asked.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        ours = model(ids)[0].log_softmax(-1)
    np.testing.assert_allclose(found["log_probabilities"], ours, atol=1e-3)
    assert found["texts"] == [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
@pytest.mark.parametrize("kind", ["llama", "llama-3"])
def test_a_gguf_holds_the_model(kind: str, dtype: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    model = made(kind)
    GgufExporter(dtype).write(model, tokenizers["gpt-2"], tmp_path, {"loss": "1.5"})
    reader = gguf.GGUFReader(tmp_path / FILE)
    assert reader.fields["deci.attention.head_count_kv"].contents() == [4, 1, 2]
    assert reader.fields["deci.feed_forward_length"].contents() == [96] * 3
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 400
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert ("rope_freqs.weight" in tensors) == (kind == "llama-3")
    state, tolerance = model.state_dict(), {"fp32": 0, "fp16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}[dtype]
    for name, key in {"token_embd": "embed_tokens", "blk.1.ffn_down": "layers.1.mlp.down_proj"}.items():
        stored = tensors[f"{name}.weight"]
        assert stored.tensor_type.name == {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype]
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        np.testing.assert_allclose(values, state[f"model.{key}.weight"], atol=tolerance)
    assert "| loss | 1.5 |" in (tmp_path / "README.md").read_text()


def test_what_llama_cpp_does_not_know_is_refused_by_name(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no norms of queries and keys \(qk_norm\); use export=hf"):
        GgufExporter().check(made("qwen3").shape, tokenizers["gpt-2"])
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match=r"words.json: .* no name for its kind \(WordLevel after Whitespace\)"):
        GgufExporter().check(SHAPE, tmp_path / "words.json")
    with pytest.raises(UserError, match="dtype is 'int4'; for gguf use fp32, fp16, bf16, q8_0"):
        GgufExporter("int4")


@pytest.mark.parametrize("kind", FEATURES)
def test_a_uniform_export_is_a_plain_model_that_computes_the_same(
    kind: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    model, tokens = made(kind), torch.randint(380, (2, 40), generator=torch.Generator().manual_seed(0))
    UniformExporter().write(model, tokenizers["gpt-2"], tmp_path, {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.model_type == ("qwen3" if kind == "qwen3" else "llama")
    assert plain.config.num_key_value_heads == 4
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    loaded, own = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tokenizers["gpt-2"]))
    assert loaded(TEXT).input_ids == own.encode(TEXT).ids
    with torch.no_grad():
        torch.testing.assert_close(HfExporter().read(tmp_path)(tokens), model(tokens), atol=1e-4, rtol=1e-4)


def test_no_plain_model_has_both_norms_and_biases_in_its_ffn() -> None:
    with pytest.raises(UserError, match=r"norms of queries and keys \(qk_norm\) and biases in its FFN"):
        UniformExporter().check(dataclasses.replace(SHAPE, qk_norm=True, mlp_bias=True), None)


def test_a_modelopt_export_has_the_layers_that_its_block_configs_state(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    model, x = made("llama-3"), torch.randn(1, 5, 64)
    ModelOptExporter().write(model, tokenizers["gpt-2"], tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    state, layers = load_file(tmp_path / "model.safetensors"), cast(Any, model.model.layers)
    for index, block in enumerate(config["block_configs"]):  # as ModelOpt's reader does: each layer its own config
        own = LlamaConfig.from_dict(config)
        own.num_key_value_heads = block["attention"]["num_key_value_heads"]
        own.intermediate_size = block["ffn"]["intermediate_size"]
        layer, prefix = LlamaDecoderLayer(own, index), f"model.layers.{index}."
        layer.load_state_dict({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
        assert torch.equal(layer.mlp(x), layers[index].mlp(x))


def test_megatron_core_reads_the_layers_and_the_arguments(tmp_path: Path) -> None:
    model = made("qwen3")
    MegatronExporter().write(model, None, tmp_path, {})
    arguments = json.loads((tmp_path / ARGUMENTS).read_text())
    assert arguments["config"]["qk_layernorm"] and not arguments["config"]["add_bias_linear"]
    assert arguments["config"]["num_layers"] == len(json.loads((tmp_path / LAYERS).read_text())["block_configs"])
    parameters = 400 * 64 + 64  # counted as Megatron-Core builds them, from the two files alone
    for block in json.loads((tmp_path / LAYERS).read_text())["block_configs"]:
        attention, ffn = block["attention"], block["ffn"]
        assert not any(part[key] for part in (attention, ffn) for key in ("no_op", "replace_with_linear"))
        heads = arguments["config"]["num_attention_heads"] + 2 * attention["num_query_groups"]
        width, channels = arguments["config"]["hidden_size"], arguments["config"]["kv_channels"]
        parameters += (heads + arguments["config"]["num_attention_heads"]) * channels * width
        parameters += 3 * width * ffn["ffn_hidden_size"] + 2 * width + 2 * channels
    assert parameters == sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize(
    ("features", "arguments"),
    [
        (LINEAR, {"seq_len_interpolation_factor": 2.5}),
        (LLAMA3 | {"original_max_position_embeddings": 8192}, {"rope_scaling": True, "rope_scaling_factor": 4.0}),
        (LLAMA3, None),
        (YARN, None),
    ],
)
def test_megatron_cores_rotary_embeddings(
    features: dict[str, Any], arguments: dict[str, Any] | None, tmp_path: Path
) -> None:
    shape = dataclasses.replace(SHAPE, rope_scaling=features)
    if arguments is None:
        with pytest.raises(UserError, match="Megatron-Core's GPTModel scales linearly"):
            MegatronExporter().check(shape, None)
        return
    with torch.device("meta"):
        MegatronExporter().write(Decoder(shape, (1, 1, 1)), None, tmp_path, {})
    assert arguments.items() <= json.loads((tmp_path / ARGUMENTS).read_text())["model"].items()


def test_megatron_core_has_one_switch_for_biases() -> None:
    with pytest.raises(UserError, match="one switch for the biases"):
        MegatronExporter().check(made("odd").shape, None)


def test_all_formats_in_one_call_and_a_finetuned_model_in_two(nas: Nas, workspace: Workspace) -> None:
    formats = "hf,gguf,modelopt,megatron,uniform,config"
    export = ("export", "run=runs/search/base", "select=best_loss")
    done = nas(*export, f"export={formats}", "name=all", "export.dtype=bf16")
    assert done.code == 0, done.err
    run = workspace.runs / "export/all"
    (vector,) = {folder.name for folder in run.glob("*/*/")}
    assert {folder.parent.name for folder in run.glob("*/*/")} == set(formats.split(","))
    assert (run / "gguf" / vector / FILE).is_file()
    assert not list((run / "config" / vector).glob("*.safetensors"))
    assert json.loads((run / "uniform" / vector / "config.json").read_text())["dtype"] == "bfloat16"
    for card in run.glob("*/*/README.md"):
        assert f"| KV groups by layer | {vector} |" in card.read_text()

    data = (*workspace.arguments[1:3], *(word for word in workspace.arguments if word.startswith("train.")))
    more = nas("finetune", "checkpoint=runs/export/all", "export=hf,gguf", "name=more", *data)
    assert more.code == 0, more.err
    assert (workspace.runs / "finetune/more/gguf/model" / FILE).is_file()
    again = nas("generate", "checkpoint=runs/finetune/more", "prompt=import", "new_tokens=2", "name=text")
    assert again.code == 0, again.err
    assert json.loads((workspace.runs / "generate/text/run.json").read_text())["parents"]["checkpoint"]
    refused = nas(*export, "export=hf", "export.dtype=int4")
    check_refusal(refused, ["export.dtype is 'int4'", "use fp32, fp16, bf16"])
    check_refusal(nas(*export, "export=hf,nope"), ["export/nope", f"use {', '.join(sorted(formats.split(',')))}"])


def test_the_cards_name_engines_that_were_tried() -> None:
    tried = (ROOT / "docs/engines.csv").read_text()
    engines = [engine for rows in _ENGINES.values() for engine, *_ in rows]
    assert [version for engine in engines for version in re.findall(r"\d[\d.]+", engine) if version not in tried] == []
