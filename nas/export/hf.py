"""The Hugging Face format: a directory that ``AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`` loads.

It is a `nemotron-nas` model (`DeciLMForCausalLM`), a type that vLLM, llama.cpp and mlx-lm implement, each layer with a
KV cache of its own size. transformers does not, so a small file of model code travels along.
"""

import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas.data.tokenizer import (
    beginning_id,
    copy_companions,
    end_of_text_id,
    json_beside,
    load_tokenizer,
    special_ids,
)
from nas.errors import UserError, in_short
from nas.files import read_json, write_atomically, write_json
from nas.model import Decoder
from nas.shape import LayerSpec, ModelShape
from nas.space import format_vector

_REMOTE_CODE = "modeling_decilm"
_UNPADDED = "unpadded_intermediate_size"  # our own key; engines pass it over
_FFN_MULTIPLE = 256  # engines round the FFN width up to this
_FFN_AXES = {"gate_proj.weight": 0, "up_proj.weight": 0, "gate_proj.bias": 0, "up_proj.bias": 0, "down_proj.weight": 1}
_CARD_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nemotron-nas, grouped-query-attention, neural-architecture-search]
---
"""
_WEIGHTLESS_CODE = """```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)  # random weights
```
"""
_CARD_CODE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
```
"""


def padded_ffn_width(width: int) -> int:
    """The FFN width as it is stored: engines compute it as 2/3 · ffn_mult · hidden_size, rounded up to a multiple."""
    return math.ceil(width / _FFN_MULTIPLE) * _FFN_MULTIPLE


class HfExporter:
    """See `nas.export.Exporter`."""

    config, weights, of_served = "config.json", "model.safetensors", False

    def write(self, model: Decoder, tokenizer: Path | None, folder: Path, card: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if _has_weights(model):
            state = _padded_state(model)
            write_atomically(folder / self.weights, lambda path: save_file(state, path, metadata={"format": "pt"}))
        special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
        generation = {"do_sample": False}
        if tokenizer:
            generation |= json_beside(tokenizer, "generation_config.json") or {}
            special = _save_tokenizer(tokenizer, folder, model.shape.max_position_embeddings)
        write_json(folder / self.config, hf_config(model.shape, model.specs) | special)
        write_json(folder / "generation_config.json", special | generation)
        shutil.copy(Path(__file__).with_name(f"{_REMOTE_CODE}.py"), folder)
        (folder / "README.md").write_text(_card(model, card), encoding="utf-8")

    def read(self, folder: Path, with_weights: bool = True) -> Decoder:
        config = read_json(folder / self.config)
        if config.get("model_type") != "nemotron-nas":
            raise UserError(f"{folder} holds a '{config.get('model_type')}' model, not an exported nemotron-nas one")
        try:
            shape = _shape(config)
            heads = shape.num_attention_heads
            vector = [heads // block["attention"]["n_heads_in_group"] for block in config["block_configs"]]
            if len(vector) != shape.num_hidden_layers:
                raise ValueError(f"block_configs lists {len(vector)} layers, not num_hidden_layers of them")
            with torch.device("cpu" if with_weights else "meta"):
                model = Decoder(shape, vector)
            if with_weights:
                state = load_file(folder / self.weights)
                if shape.tie_word_embeddings:
                    state["lm_head.weight"] = state["model.embed_tokens.weight"]
                for name, axis, width in _ffn_tensors(model.state_dict()):
                    state[name] = state[name].narrow(axis, 0, width)
                model.load_state_dict(state)
        except (OSError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} is corrupt ({in_short(error)}); export it again") from None
        return model


class ConfigExporter(HfExporter):
    """The same without weights: the served shape's configuration, from which a model is trained from the start."""

    of_served = True


def hf_config(shape: ModelShape, specs: Sequence[LayerSpec]) -> dict[str, Any]:
    """The contents of config.json, but for the tokenizer's; FFN widths are as engines will compute them."""
    own = dataclasses.asdict(shape)
    o_bias, scaling = own.pop("o_bias"), own.pop("rope_scaling") or {}
    width = max(padded_ffn_width(spec.intermediate_size) for spec in specs)
    heads, kept = shape.num_attention_heads, {"no_op": False, "replace_with_linear": False}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": f"{_REMOTE_CODE}.DeciLMConfig",
            "AutoModel": f"{_REMOTE_CODE}.DeciLMModel",
            "AutoModelForCausalLM": f"{_REMOTE_CODE}.DeciLMForCausalLM",
        },
        "block_configs": [
            {
                "attention": {"n_heads_in_group": heads // spec.kv_groups, **kept},
                "ffn": {"ffn_mult": 3 * padded_ffn_width(spec.intermediate_size) / (2 * spec.hidden_size), **kept},
            }
            for spec in specs
        ],
        "num_key_value_heads_per_layer": [spec.kv_groups for spec in specs],
        "num_key_value_heads": max(spec.kv_groups for spec in specs),
        **own,
        "intermediate_size": width,
        **({} if width == shape.intermediate_size else {_UNPADDED: shape.intermediate_size}),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta, **scaling},
        **({"rope_scaling": scaling} if scaling else {}),  # where transformers 4 looks for it
        "hidden_act": "silu",
        "attention_bias": o_bias,  # where there is a qkv_bias, vLLM takes it for the output projection's alone
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that `hf_config` wrote, without padding."""
    names = {field.name for field in dataclasses.fields(ModelShape)} & config.keys()
    width = config.get(_UNPADDED, config["intermediate_size"])
    own = {name: config[name] for name in names} | {"intermediate_size": width}
    return ModelShape(**own, o_bias=config.get("attention_bias", False))


def _ffn_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, int, int]]:
    """Names of the tensors with an axis as long as their layer's FFN is wide, that axis, and that width."""
    for name, tensor in state.items():
        if (axis := _FFN_AXES.get(name.partition(".mlp.")[2])) is not None:
            yield name, axis, tensor.shape[axis]


def _padded_state(model: Decoder) -> dict[str, Tensor]:
    """The state dict with its FFN zero-padded to the widths that engines will compute."""
    state = model.state_dict()
    if model.shape.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, axis, width in _ffn_tensors(state):  # silu(0) · 0 = 0: the added neurons change nothing
        after = [0] * (2 * (state[name].dim() - 1 - axis))  # F.pad counts axes from the last
        state[name] = F.pad(state[name], [*after, 0, padded_ffn_width(width) - width])
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}


def _save_tokenizer(tokenizer: Path, folder: Path, context: int) -> dict[str, Any]:
    """Writes the tokenizer in the form that transformers 4 and 5 both read; returns what config.json says of it.

    What lies beside it of a checkpoint's special tokens and chat template is kept.
    """
    loaded = load_tokenizer(str(tokenizer))
    usual = {"bos_token_id": beginning_id(loaded), "eos_token_id": end_of_text_id(loaded)}
    ids = dict.fromkeys(usual) | (special_ids(tokenizer) or usual)  # null, or transformers takes Llama's
    copy_companions(tokenizer, folder)
    loaded.save(str(folder / "tokenizer.json"))
    config = json_beside(tokenizer, "tokenizer_config.json")
    if config is None:
        names = {key: ids.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
        first = {key: index[0] if isinstance(index, list) else index for key, index in names.items()}
        config = {f"{key}_token": None if index is None else loaded.id_to_token(index) for key, index in first.items()}
        config["pad_token"] = config["pad_token"] or config["eos_token"]
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    write_json(folder / "tokenizer_config.json", config | own)
    return ids


def _has_weights(model: Decoder) -> bool:
    return not model.lm_head.weight.is_meta


def _card(model: Decoder, card: Mapping[str, str]) -> str:
    shape, widths = model.shape, sorted({spec.intermediate_size for spec in model.specs})
    padded, has_weights = [padded_ffn_width(width) for width in widths], _has_weights(model)
    added = _listed(new - old for new, old in zip(padded, widths, strict=True))
    wide = f"The FFN is stored {_listed(padded)} wide: inference engines round its width up to a multiple of "
    wide += f"{_FFN_MULTIPLE}, so {added}"
    notes = {
        "It has no weights: it is to be trained from the start, by `nas finetune from_scratch=true` or by other "
        "code. A tokenizer.json that lies here, of at most as many tokens as the vocabulary, is used; replace it by "
        "your own.": not has_weights,
        f"{wide} zero neurons were added, which change no output.": has_weights and padded != widths,
        f"{wide} neurons were added, which `nas finetune` leaves out.": not has_weights and padded != widths,
        f"Its heads are {shape.head_dim} wide, which is not hidden_size / num_attention_heads: transformers reads "
        "head_dim from the configuration, llama.cpp and mlx-lm do not.": (
            shape.head_dim * shape.num_attention_heads != shape.hidden_size
        ),
        "It normalises queries and keys head by head (q_norm, k_norm): transformers computes that with the code in "
        "this folder, but the nemotron-nas code of vLLM, llama.cpp and mlx-lm does not know it.": shape.qk_norm,
        "Not all of its attention's projections have biases: transformers and vLLM read from qkv_bias and "
        "attention_bias which of them do, mlx-lm expects all or none.": shape.qkv_bias != shape.o_bias,
    }
    rows = "\n".join(f"| {title} | {value} |" for title, value in card.items())
    paragraphs = [
        f"{_CARD_HEAD}# A model with KV groups {format_vector(model.kv_heads)}",
        f"A Llama-style decoder whose layers differ in their number of KV groups: {shape.num_hidden_layers} layers, "
        f"width {shape.hidden_size}, {shape.num_attention_heads} heads of {shape.head_dim}, "
        f"FFN {_listed(widths)}, vocabulary {shape.vocab_size}, context {shape.max_position_embeddings}; "
        f"{shape.parameters(model.kv_heads):,} parameters. Found by gqa-nas.",
        *(note for note, holds in notes.items() if holds),
        f"| what | value |\n| --- | --- |\n{rows}",
        _CARD_CODE if has_weights else _WEIGHTLESS_CODE,
    ]
    return "\n\n".join(paragraphs)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
