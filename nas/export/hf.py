"""The Hugging Face format: a directory that ``AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`` loads.

It is a `nemotron-nas` model (`DeciLMForCausalLM`), a type that vLLM and mlx-lm implement, each layer with a KV cache of
its own size. transformers does not, so two small files of model code travel along.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from nas.data.tokenizer import copy_companions, document_frame, json_beside, load_tokenizer, special_or_usual_ids
from nas.errors import UserError
from nas.export.card import write_card
from nas.files import write_atomically, write_json
from nas.model import Decoder
from nas.model.config_json import UNPADDED, padded_ffn_width
from nas.model.decoder import untied
from nas.model.pretrained import read_checkpoint
from nas.shape import ModelShape
from nas.space import Vector

CONFIG = "config.json"
_WEIGHTS = "model*.safetensors"  # one file, or shards
_CODE = ("configuration_decilm", "modeling_decilm")
_TYPES = {False: ("nemotron-nas", "DeciLM"), True: ("nemotron-nas-qk-norm", "DeciLMQKNorm")}  # by the shape's qk_norm
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # null, or transformers takes Llama's
_GREEDY = {"do_sample": False}  # generation_config.json, where a checkpoint does not say otherwise
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder"{code})
tokenizer = AutoTokenizer.from_pretrained("this folder"{code})
```
"""
_NO_WEIGHTS = """```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)  # random weights
```
"""


class HfExporter:
    """See `nas.export.Exporter`; others in Hugging Face's layout build on it. ``max_shard_size``: such as 5GB."""

    of_served, form, has_code = False, "hf", True  # has_code: model code travels along
    usage = LOADING.format(code=", trust_remote_code=True")  # how the card says that the directory is loaded

    def __init__(self, dtype: str = "fp32", max_shard_size: str = "5GB") -> None:
        if dtype not in _DTYPES:
            raise UserError(f"export.dtype is '{dtype}'; use {', '.join(_DTYPES)}")
        self.dtype, self.max_shard_size = _DTYPES[dtype], max_shard_size

    def check(self, shape: ModelShape, tokenizer: Path | None) -> None:
        """This format holds every model."""

    def write(self, model: Decoder, tokenizer: Path | None, folder: Path, card: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not self.of_served:
            state = self.state(model)
            self._save({n: x.detach().to("cpu", self.dtype).contiguous() for n, x in state.items()}, folder)
        if tokenizer:
            special = _save_tokenizer(tokenizer, folder, model.shape.max_position_embeddings)
        else:
            special = _NO_IDS
            write_json(folder / "generation_config.json", special | _GREEDY)
        dtype = str(self.dtype).removeprefix("torch.")
        write_json(folder / CONFIG, self.config(model) | {"dtype": dtype, "torch_dtype": dtype} | special)
        if self.has_code:
            copy_code(folder)
        write_card(self.form, model, folder, card, self.notes(model), self.usage)

    def _save(self, state: dict[str, Tensor], folder: Path) -> None:
        split = split_torch_state_dict_into_shards(state, max_shard_size=self.max_shard_size)
        for name, tensors in split.filename_to_tensors.items():
            shard = {tensor: state[tensor] for tensor in tensors}
            write_atomically(folder / name, partial(save_file, shard, metadata={"format": "pt"}))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)

    def config(self, model: Decoder) -> dict[str, Any]:
        """The contents of config.json, but for the tokenizer's and the dtype."""
        return hf_config(model.shape, model.kv_heads)

    def state(self, model: Decoder) -> dict[str, Tensor]:
        """The tensors that are stored: here with the FFN zero-padded to the widths that engines will compute."""
        state = untied(model.shape, model.state_dict())
        for name, tensor in state.items():  # silu(0) · 0 = 0: the added neurons change nothing
            if ".mlp." in name and not name.endswith("down_proj.bias"):
                axis = 1 if "down_proj" in name else 0
                added = padded_ffn_width(tensor.shape[axis]) - tensor.shape[axis]
                state[name] = F.pad(tensor, [0, 0] * (tensor.dim() - 1 - axis) + [0, added])  # from the last axis
        return state

    def notes(self, model: Decoder) -> list[str]:
        """What a user of the directory must know."""
        shape, loaded = model.shape, not self.of_served
        width, padded = shape.intermediate_size, padded_ffn_width(shape.intermediate_size)
        wide = f"The FFN is stored {padded} wide: inference engines round its width up to a multiple of 256, so "
        wide += str(padded - width)
        notes = {
            "It has no weights: it is to be trained from the start, by `nas finetune from_scratch=true` or by other "
            "code. A tokenizer.json that lies here, of at most as many tokens as the vocabulary, is used; replace it "
            "by your own.": not loaded,
            f"{wide} zero neurons were added, which change no output.": loaded and padded != width,
            f"{wide} neurons were added, which `nas finetune` leaves out.": not loaded and padded != width,
            f"Its heads are {shape.head_dim} wide, which is not hidden_size / num_attention_heads: transformers and "
            "vLLM read head_dim from the configuration, mlx-lm does not.": (
                shape.head_dim * shape.num_attention_heads != shape.hidden_size
            ),
            "It normalises queries and keys head by head (q_norm, k_norm): its type is one of its own, which "
            "transformers and vLLM compute with the code in this folder; other engines do not know it.": shape.qk_norm,
            "Not all of its attention's projections have biases: transformers and vLLM read from qkv_bias and "
            "attention_bias which of them do, mlx-lm expects all or none.": shape.qkv_bias != shape.o_bias,
        }
        return [note for note, holds in notes.items() if holds]

    def read(self, folder: Path, with_weights: bool = True) -> Decoder:
        """Reads a model back, running none of its code; without its weights it is on the meta device."""
        return read_checkpoint(folder, with_weights).model(with_weights)


class ConfigExporter(HfExporter):
    """The same without weights: the served shape's configuration, from which a model is trained from the start."""

    of_served, usage = True, _NO_WEIGHTS


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of an exported directory."""
    return sorted(folder.glob(_WEIGHTS))


def hf_config(shape: ModelShape, vector: Vector) -> dict[str, Any]:
    """The contents of config.json, but for the tokenizer's and the dtype; the FFN's width is as engines compute it."""
    width, kept = padded_ffn_width(shape.intermediate_size), {"no_op": False, "replace_with_linear": False}
    ffn = {"ffn_mult": 3 * width / (2 * shape.hidden_size), **kept}
    (kind, prefix), (configuration, modeling) = _TYPES[shape.qk_norm], _CODE
    return {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": kind,
        "auto_map": {
            "AutoConfig": f"{configuration}.{prefix}Config",
            "AutoModel": f"{modeling}.{prefix}Model",
            "AutoModelForCausalLM": f"{modeling}.{prefix}ForCausalLM",
        },
        "block_configs": [
            {"attention": {"n_heads_in_group": shape.num_attention_heads // groups, **kept}, "ffn": ffn}
            for groups in vector
        ],
        "num_key_value_heads_per_layer": list(vector),
        "num_key_value_heads": max(vector),
        **llama_keys(shape),
        "qkv_bias": shape.qkv_bias,
        "qk_norm": shape.qk_norm,
        "attention_bias": shape.o_bias,  # where there is a qkv_bias, vLLM takes it for the output projection's alone
        "intermediate_size": width,
        **({} if width == shape.intermediate_size else {UNPADDED: shape.intermediate_size}),
    }


def llama_keys(shape: ModelShape) -> dict[str, Any]:
    """What config.json says of a shape in any dialect of Llama, biases of the attention apart."""
    scaling, ours = shape.rope_scaling, ("rope_scaling", "qkv_bias", "o_bias", "qk_norm")
    own = {key: value for key, value in asdict(shape).items() if key not in ours}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta, **(scaling or {})}}
    legacy = {"rope_scaling": scaling} if scaling else {}  # where transformers 4 looks for it, and engines do
    return own | rope | legacy | {"hidden_act": "silu"}


def copy_code(folder: Path) -> None:
    """Copies the model code that transformers needs beside a configuration."""
    for name in _CODE:
        shutil.copy(Path(__file__).with_name(f"{name}.py"), folder)


def _save_tokenizer(tokenizer: Path, folder: Path, context: int) -> dict[str, Any]:
    """Writes the tokenizer in the form that transformers 4 and 5 both read; returns what config.json says of it.

    What lies beside it of a checkpoint's special tokens and chat template is kept.
    """
    loaded = load_tokenizer(str(tokenizer))
    ids = _NO_IDS | special_or_usual_ids(tokenizer, loaded)
    copy_companions(tokenizer, folder, ids | _GREEDY)
    loaded.save(str(folder / "tokenizer.json"))
    config = json_beside(tokenizer, "tokenizer_config.json")
    if config is None:
        names = {key: ids.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
        first = {key: index[0] if isinstance(index, list) else index for key, index in names.items()}
        config = {f"{key}_token": None if index is None else loaded.id_to_token(index) for key, index in first.items()}
        config["pad_token"] = config["pad_token"] or config["eos_token"]
        config["add_bos_token"] = bool(document_frame(loaded, tokenizer)[0])
    config.pop("auto_map", None)  # somebody else's code, which whoever trusts this directory did not mean
    if isinstance(config.get("extra_special_tokens"), list):  # as transformers 5 writes them; 4 takes a mapping
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    own = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "padding_side": "left",  # transformers 4 pads on the right and gives token types, with which batches fail
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config | own)
    return ids
