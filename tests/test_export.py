"""Exported directories: loaded by transformers, read back by us, finetuned further."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from nas.data.tokenizer import train_tokenizer
from nas.errors import UserError
from nas.export.hf import HfExporter, hf_config
from nas.model import Supernet
from nas.model.config_json import padded_ffn_width
from nas.search import Objectives
from nas.serving import KVCache, Runner, ServingModel, generate
from nas.shape import ModelShape
from nas.space import SearchSpace, Vector
from nas.stages.export import open_checkpoint, select
from tests.conftest import Nas, logits_at, random_supernet
from tests.helpers import LINEAR, LLAMA3, TRAINING, YARN

MIXED: list[Vector] = [(4, 1, 2), (1, 1, 4)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.json."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["some words to learn from, and some more words " * 50], 270).save(str(path))
    return path


@pytest.fixture(scope="module")
def supernet(micro: SearchSpace) -> Supernet:
    """A random supernet of the micro space."""
    return random_supernet(micro, seed=5)


@pytest.fixture(scope="module", params=MIXED, ids=str)
def exported(
    request: pytest.FixtureRequest, supernet: Supernet, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Vector, Path]:
    """A vector that mixes 1, 2 and 4, and its exported directory."""
    folder = tmp_path_factory.mktemp("exported")
    HfExporter().write(supernet.extract(request.param), tokenizer, folder, {"loss": "1.5 nats/token (measured)"})
    return request.param, folder


@pytest.fixture(scope="module")
def exported_once(supernet: Supernet, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One exported model, with a tokenizer as large as its vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([text_file.read_text()], 320).save(str(folder / "tokenizer.json"))
    HfExporter().write(supernet.extract((4, 1, 2)), folder / "tokenizer.json", folder / "4-1-2", {})
    return folder / "4-1-2"


def engine_ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """The FFN width that inference engines compute for a nemotron-nas block."""
    return math.ceil(int(2 * ffn_mult * hidden_size / 3) / 256) * 256


def test_transformers_computes_the_sub_networks_logits(exported: tuple[Vector, Path], supernet: Supernet) -> None:
    vector, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = logits_at(supernet, tokens, [vector] * 3)
        torch.testing.assert_close(model(tokens).logits, ours, atol=1e-4, rtol=1e-4)


def test_greedy_generation_is_the_same_without_with_dynamic_and_with_static_cache(
    exported: tuple[Vector, Path],
) -> None:
    vector, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, use_cache=False, **how)
    assert torch.equal(model.generate(prompt, **how), plain)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **how), plain)
    cached = model(prompt, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cached.layers] == list(vector)


def test_our_own_cached_decoding_gives_the_same_tokens(exported: tuple[Vector, Path]) -> None:
    _, folder = exported
    reference = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.randint(300, (1, 4), generator=torch.Generator().manual_seed(2))
    expected = reference.generate(prompt, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    model = HfExporter().read(folder)
    runner = Runner(ServingModel.of(model), KVCache(model.shape, model.kv_heads, 1, 32))
    produced = generate(runner, prompt, 12, stop={reference.generation_config.eos_token_id})[0].tolist()
    assert produced == expected


def test_the_tokenizer_travels_along(exported: tuple[Vector, Path]) -> None:
    loaded = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    assert loaded.decode(loaded("some words, é ∑").input_ids) == "some words, é ∑"
    assert loaded.eos_token == "<|endoftext|>"


def test_a_batch_of_texts_of_several_lengths_is_continued_as_each_text_alone(exported: tuple[Vector, Path]) -> None:
    texts = ["some words", "more", "and some more words to learn from"]
    tokenizer = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=True)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    several = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)[:, batch.input_ids.shape[1] :]
    for text, new in zip(texts, several, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, min_new_tokens=8)
        assert torch.equal(alone[0, -8:], new)


def test_the_tokenizer_loads_where_there_is_no_torch(tokenizer: Path, tmp_path: Path) -> None:
    shape = dataclasses.replace(ModelShape(1, 32, 4, 8, 256, 280, 40), **FEATURED["llama-3"])
    HfExporter().write(random_supernet(SearchSpace("m", shape, ((1, 2),))).extract((2,)), tokenizer, tmp_path, {})
    code = "import sys; sys.modules['torch'] = None; from transformers import AutoTokenizer as A; "
    code += f"print(A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eos_token)"  # as mlx-lm does
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "<|endoftext|>" in done.stdout, done.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_in_shards_and_in_other_types_are_read_by_transformers_and_by_us(
    dtype: str, supernet: Supernet, tokenizer: Path, tmp_path: Path
) -> None:
    model = supernet.extract((4, 1, 2))
    HfExporter(dtype, max_shard_size="40KB").write(model, tokenizer, tmp_path, {})
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    kept = getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype="auto")
    assert theirs.dtype == kept
    for name, tensor in HfExporter().read(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(kept).float())
        assert torch.equal(theirs.state_dict()[name].float(), tensor)
    sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(UserError, match="cannot be read"):
        HfExporter().read(tmp_path)


@pytest.mark.parametrize("puts_it_first", [True, False])
def test_a_tokenizers_own_beginning_of_text_is_declared(
    supernet: Supernet, tokenizer: Path, tmp_path: Path, puts_it_first: bool
) -> None:
    like_llama = Tokenizer.from_file(str(tokenizer))
    like_llama.add_special_tokens(["<s>", "</s>"])
    begin, end = (like_llama.token_to_id(name) for name in ("<s>", "</s>"))
    if puts_it_first:
        like_llama.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    like_llama.save(str(tmp_path / "tokenizer.json"))
    HfExporter().write(supernet.extract((4, 1, 2)), tmp_path / "tokenizer.json", tmp_path / "model", {})
    for file in ("config.json", "generation_config.json"):
        declared = json.loads((tmp_path / "model" / file).read_text())
        assert declared["bos_token_id"] == begin
        assert declared["eos_token_id"] == like_llama.token_to_id("<|endoftext|>") != end
    assert AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True).bos_token == "<s>"


def test_saving_with_transformers_keeps_the_layers(
    exported: tuple[Vector, Path], supernet: Supernet, tmp_path: Path
) -> None:
    vector, folder = exported
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path)
    blocks = json.loads((tmp_path / "config.json").read_text())["block_configs"]
    assert [4 // block["attention"]["n_heads_in_group"] for block in blocks] == list(vector)
    wanted = supernet.extract(vector).state_dict()
    for read in (HfExporter().read(where) for where in (folder, tmp_path)):
        assert read.kv_heads == vector
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in read.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    tokens = torch.arange(20)[None]
    first = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(again(tokens).logits, first(tokens).logits)


def test_the_configuration_is_what_inference_engines_read(exported: tuple[Vector, Path]) -> None:
    vector, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config["num_key_value_heads_per_layer"] == list(vector)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert not [key for key in config if key.startswith("_")]
    for groups, block in zip(vector, config["block_configs"], strict=True):
        attention = {"n_heads_in_group": 4 // groups, "no_op": False, "replace_with_linear": False}
        assert block["attention"] == attention
        assert isinstance(block["ffn"]["ffn_mult"], float)
        assert engine_ffn_width(block["ffn"]["ffn_mult"], config["hidden_size"]) == config["intermediate_size"]


def test_whoever_may_read_the_configuration_may_read_the_weights(exported: tuple[Vector, Path]) -> None:
    modes = {(exported[1] / name).stat().st_mode for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert len(modes) == 1


def test_tensors_have_plain_llama_names(exported: tuple[Vector, Path]) -> None:
    names = set(load_file(exported[1] / "model.safetensors"))
    assert "model.layers.0.self_attn.k_proj.weight" in names
    assert "lm_head.weight" not in names  # tied


@given(st.integers(1, 20_000), st.integers(1, 10_000))
def test_engines_compute_the_width_at_which_any_ffn_is_stored(width: int, hidden_size: int) -> None:
    shape = ModelShape(1, hidden_size, 4, 8, width, 280, 32)
    config = hf_config(shape, (1,))
    assert config["intermediate_size"] == padded_ffn_width(width) >= width
    assert engine_ffn_width(config["block_configs"][0]["ffn"]["ffn_mult"], hidden_size) == config["intermediate_size"]


def test_another_width_is_zero_padded_and_the_card_says_so(tokenizer: Path, tmp_path: Path) -> None:
    shape = ModelShape(2, 32, 4, 8, 300, 280, 32)
    supernet = random_supernet(SearchSpace("odd", shape, ((1, 2),) * 2))
    model = supernet.extract((1, 2))
    HfExporter().write(model, tokenizer, tmp_path, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.config.intermediate_size == 512
    tokens = torch.randint(280, (2, 10))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    assert "212 zero neurons" in (tmp_path / "README.md").read_text()
    again = HfExporter().read(tmp_path)  # the zeros are not trained any further
    assert again.shape == shape
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert HfExporter().read(tmp_path, with_weights=False).shape == shape


FEATURED: dict[str, dict[str, Any]] = {
    "llama-biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama-linear": {"rope_scaling": LINEAR},
    "llama-3": {"rope_scaling": LLAMA3},
    "qwen2": {"qkv_bias": True, "rope_scaling": YARN, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "output-bias-and-norms": {"qk_norm": True, "o_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("kind", FEATURED)
def test_what_llamas_relatives_have_travels_to_transformers_and_back(
    kind: str, tokenizer: Path, tmp_path: Path
) -> None:
    shape = dataclasses.replace(ModelShape(3, 32, 8, 8, 300, 280, 40), **FEATURED[kind])
    model = random_supernet(SearchSpace(kind, shape, ((1, 2, 4),) * 3)).extract((4, 1, 2))
    HfExporter().write(model, tokenizer, tmp_path / "exported", {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True).padding_side == "left"
    tokens = torch.randint(280, (2, 40), generator=torch.Generator().manual_seed(0))
    for folder in (tmp_path / "exported", tmp_path / "saved"):
        reference = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            torch.testing.assert_close(reference(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
        again = HfExporter().read(folder)
        assert (again.shape, again.kv_heads) == (shape, (4, 1, 2))
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(tokens[:, :6], use_cache=False, **how), loaded.generate(tokens[:, :6], **how))

    config = json.loads((tmp_path / "exported" / "config.json").read_text())  # vLLM's words
    assert (config["qkv_bias"], config["attention_bias"]) == (shape.qkv_bias, shape.o_bias)
    assert {"rope_theta": 10000.0, **config.get("rope_scaling", {"rope_type": "default"})} == config["rope_parameters"]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert ("other engines do not know it" in card) == shape.qk_norm
    assert ("mlx-lm expects all or none" in card) == (shape.qkv_bias != shape.o_bias)


def test_an_export_from_before_these_features_is_still_read(exported: tuple[Vector, Path], tmp_path: Path) -> None:
    _, folder = exported
    shutil.copytree(folder, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    for key in ("qkv_bias", "qk_norm"):
        del config[key]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert HfExporter().read(tmp_path / "old").shape == HfExporter().read(folder).shape
    tokens = torch.arange(20)[None]
    old, new = (AutoModelForCausalLM.from_pretrained(at, trust_remote_code=True) for at in (tmp_path / "old", folder))
    assert torch.equal(old(tokens).logits, new(tokens).logits)


@pytest.mark.parametrize(
    ("choice", "selected"),
    [("all", [0, 1, 2]), ("best_loss", [0]), ("fastest", [2]), ("knee", [1]), ("2-2-2", [3]), ("4-1-2", [0])],
)
def test_one_vector_or_the_whole_front_can_be_selected(choice: str, selected: list[int]) -> None:
    rows = [("4-1-2", 2.0, 10.0), ("1-2-1", 2.1, 90.0), ("1-1-1", 3.0, 100.0), ("2-2-2", 2.5, 20.0)]
    trials = pd.DataFrame(rows, columns=["vector", "loss_nats", "tokens_per_s"])
    found = select(choice, trials[:3], trials, Objectives(("loss_nats", "tokens_per_s")))
    assert found.index.tolist() == selected


@pytest.mark.parametrize("choice", ["slowest", "1-1", "4-4-4"])
def test_what_cannot_be_selected_is_refused(choice: str) -> None:
    trials = pd.DataFrame({"vector": ["1-1-1"]})
    with pytest.raises(UserError, match=f"select is '{choice}', which this search did not evaluate; use .* all, knee"):
        select(choice, trials, trials, Objectives(("loss_nats", "tokens_per_s")))


def test_finetuning_an_export_lowers_its_loss_and_exports_again(
    nas: Nas, exported_once: Path, text_file: Path, tmp_path: Path
) -> None:
    data = (*TRAINING, "data=text", f"data.path={text_file}")
    result = nas("finetune", f"checkpoint={exported_once}", "name=more", "train.learning_rate=1e-3", *data)
    assert result.code == 0, result.err
    before, after = (float(result.out.split(word)[0].split()[-1]) for word in (" before", " after;"))
    assert after < before
    model = tmp_path / "runs" / "finetune" / "more" / "model"
    assert HfExporter().read(model).kv_heads == (4, 1, 2)
    assert AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).config.model_type == "nemotron-nas"

    assert nas("generate", "checkpoint=runs/finetune/more", "prompt=import", "new_tokens=2", "name=text").code == 0
    written = json.loads((tmp_path / "runs" / "generate" / "text" / "run.json").read_text())
    assert written["parents"]["checkpoint"]["path"] == "../../finetune/more"

    scratch = nas("finetune", f"checkpoint={exported_once}", "from_scratch=true", *data, "name=scratch")
    assert scratch.code == 0, scratch.err
    before = float(scratch.out.split(" before")[0].split()[-1])
    assert before == pytest.approx(math.log(320), abs=0.1)  # fresh weights know nothing


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, "model is a 'gemma' model; give one of type llama, .* or nemotron-nas"),
        ({"block_configs": None}, "config.json is not valid .*; fix or restore it"),
        ({"num_hidden_layers": 5}, r"config.json is not valid \(block_configs lists 3 layers"),
        ({"hidden_size": 64}, r"do not fit its config.json: \S+ has another shape than"),
        ({"hidden_size": "wide"}, "config.json is not valid"),
        ({"block_configs": 3 * [{"attention": {"n_heads_in_group": 0}, "ffn": {"ffn_mult": 1}}]}, "is not valid"),
        (None, "model.safetensors cannot be read"),
    ],
)
def test_a_damaged_model_is_refused(
    exported_once: Path, tmp_path: Path, change: dict[str, Any] | None, words: str
) -> None:
    folder = shutil.copytree(exported_once, tmp_path / "model")
    if change is None:
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        HfExporter().read(folder)


def test_the_only_model_in_a_folder_is_found_and_several_need_a_choice(exported_once: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(exported_once, tmp_path / "models" / name)
        found = open_checkpoint(str(tmp_path / "models" / name))
        assert found == (tmp_path / "models" / name, {})
        if name == "one":
            assert open_checkpoint(str(tmp_path / "models")) == found
    with pytest.raises(UserError, match=r"holds 2 models; give one of them, such as .*models/one"):
        open_checkpoint(str(tmp_path / "models"))
    (tmp_path / "models" / "one" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"models/one has no model.safetensors; export it again"):
        open_checkpoint(str(tmp_path / "models" / "one"))
    (tmp_path / "models" / "one" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"models/one has no tokenizer.json; copy that of its model into it"):
        open_checkpoint(str(tmp_path / "models" / "one"))
    with pytest.raises(UserError, match=r"checkpoint nowhere does not exist or has no config.json; .*'nas export'"):
        open_checkpoint("nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_checkpoint("")
