"""The config.json of a Hugging Face model: the shape that it states, and why our decoder may not compute it.

transformers reads it, so that every model type has defaults of its own. A config that asks for what our decoder does
not compute is refused, and code that lies beside it is never run.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas import console
from nas.errors import UserError, in_short
from nas.files import read_json
from nas.shape import ROPE_KEYS, ModelShape
from nas.space import Vector

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
NEMOTRON_TYPES = ("nemotron-nas", "nemotron-nas-qk-norm")  # always with block_configs; the second is our own
UNPADDED = "unpadded_intermediate_size"  # a key of our own exports, whose FFN may be stored wider; engines pass it over
_FFN_MULTIPLE = 256  # to which nemotron-nas rounds up the FFN's width
_SIZES = ("n_heads_in_group", "num_key_value_heads", "ffn_mult", "intermediate_size")  # what a block may choose
_NOT_LLAMAS = ("model_type", "auto_map", "block_configs", "per_layer_config", *_SIZES)
_USUAL = {"gated": (None, True), "hidden_act": (None, "silu")}
_SAME = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "rms_norm_eps")


def read_config(folder: Path) -> tuple[ModelShape, Vector, bool]:
    """The shape, each layer's K/V heads, and whether there are block_configs; what we cannot compute is refused."""
    if not (folder / "config.json").is_file():
        lack = "has no config.json" if folder.exists() else "does not exist"
        raise UserError(f"checkpoint {folder} {lack}; give the directory of a Hugging Face model")
    stated = read_json(folder / "config.json")
    kind = stated.get("model_type")
    if kind not in (*MODEL_TYPES, *NEMOTRON_TYPES):
        raise UserError(
            f"checkpoint {folder} is a '{kind}' model; give one of type {', '.join(MODEL_TYPES)} or {NEMOTRON_TYPES[0]}"
        )
    in_blocks = kind in NEMOTRON_TYPES or bool(stated.get("block_configs"))
    try:
        obstacle = next(_obstacles_in_blocks(stated["block_configs"]), None) if in_blocks else None
        if not obstacle:
            config, kv_heads = _config(folder, stated, in_blocks)
            obstacle = next(_obstacles(stated, config, kv_heads), None)
        shape = None if obstacle else _shape(config, stated)
    except Exception as error:  # whatever the library's checks raise, and what values of a wrong kind lead to
        raise UserError(f"{folder / 'config.json'} is not valid ({in_short(error)}); fix or restore it") from None
    if not shape:
        raise UserError(f"checkpoint {folder} {obstacle}; give another checkpoint")
    if shape.max_position_embeddings < config.max_position_embeddings:
        console.print(
            f"Checkpoint {folder} attends over a sliding window of {config.sliding_window} tokens: its context of "
            f"{config.max_position_embeddings} is cut to that, within which it computes the same"
        )
    return shape, kv_heads, in_blocks


def padded_ffn_width(width: int) -> int:
    """The width at which nemotron-nas stores an FFN: 2/3 · ffn_mult · hidden_size, rounded up to a multiple of 256."""
    return math.ceil(width / _FFN_MULTIPLE) * _FFN_MULTIPLE


def _config(folder: Path, stated: Mapping[str, Any], in_blocks: bool) -> tuple[Any, Vector]:
    """A config with transformers' defaults, and the K/V heads of each layer. Where there are blocks, they decide."""
    import transformers  # heavy

    transformers.logging.set_verbosity_error()  # what matters is in our sentences
    config: Any
    if stated["model_type"] in NEMOTRON_TYPES:  # a Llama but for its blocks
        own = {key: value for key, value in stated.items() if key not in _NOT_LLAMAS and value is not None}
        config = transformers.LlamaConfig(**own)
    else:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not in_blocks:
        return config, (config.num_key_value_heads,) * config.num_hidden_layers
    heads, blocks = config.num_attention_heads, stated["block_configs"]
    if len(blocks) != config.num_hidden_layers:
        raise ValueError(f"block_configs lists {len(blocks)} layers, not num_hidden_layers of them")
    attentions, ffn = [block["attention"] for block in blocks], blocks[0]["ffn"]  # the FFNs are alike
    kv_heads = [one.get("num_key_value_heads") or heads / one["n_heads_in_group"] for one in attentions]
    mult = ffn.get("ffn_mult")
    width = padded_ffn_width(int(2 * mult * config.hidden_size / 3)) if mult else ffn["intermediate_size"]
    config.intermediate_size = stated.get(UNPADDED, width)
    if not all(groups % 1 == 0 for groups in kv_heads):
        raise ValueError(f"n_heads_in_group does not divide num_attention_heads, {heads}, in each layer")
    return config, tuple(map(int, kv_heads))


def _obstacles_in_blocks(blocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What block_configs ask for beyond attention and an FFN (SwiGLU) in every layer, that of one width."""
    for layer, block in enumerate(blocks):
        for part in block:
            if part not in ("attention", "ffn") and block[part]:
                yield f"has {part} in layer {layer} (block_configs), which are not supported"
        for part in ("attention", "ffn"):
            for key, value in block[part].items():
                usual = value in _USUAL[key] if key in _USUAL else key in _SIZES or not value
                if not usual:
                    shown = f"{key} {json.dumps(value)} in the {part} of layer {layer} (block_configs)"
                    yield f"has {shown}, which is not supported: every layer has attention and an FFN (SwiGLU) here"
    for key in ("ffn_mult", "intermediate_size"):
        if len(different := {block["ffn"].get(key) for block in blocks}) > 1:
            shown = f"{key} {' and '.join(map(str, sorted(different)[:: len(different) - 1]))}"
            yield f"has FFNs of different widths ({shown} in block_configs), and only one for all layers is supported"


def _obstacles(stated: Mapping[str, Any], config: Any, kv_heads: Vector) -> Iterator[str]:
    """What a config asks for that our decoder does not compute. ``stated`` is its file, ``config`` has defaults too."""
    rope = _rope(config)
    if stated.get("quantization_config"):
        yield "is quantised (quantization_config), and only full weights can be trained"
    if config.hidden_act != "silu":
        yield f"has hidden_act '{config.hidden_act}', and only silu is supported"
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        yield f"has layers of {', '.join(sorted(map(str, other)))}, and only full and sliding attention are supported"
    if not all(stated.get("no_rope_layers") or [True]):
        yield "has layers without rotary embeddings (no_rope_layers), which are not supported"
    if any(isinstance(value, Mapping) for value in rope.values()):
        yield "has different rotary embeddings in different layers (rope_parameters), which are not supported"
    if rope.get("rope_type") not in (None, "default", *ROPE_KEYS):
        yield f"has rope_type '{rope['rope_type']}', and only default, {', '.join(ROPE_KEYS)} are supported"
    if (share := rope.get("partial_rotary_factor") or stated.get("partial_rotary_factor") or 1) != 1:
        yield f"has partial_rotary_factor {share}, and only whole heads are rotated here"
    for heads in kv_heads:
        if config.num_attention_heads % heads:
            yield f"has {heads} K/V heads, which do not divide its {config.num_attention_heads} heads"


def _rope(config: Any) -> dict[str, Any]:
    """What a config says of rotary embeddings; transformers 4 keeps it as rope_scaling, often with a ``type``."""
    values = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    legacy = values.pop("type", None)
    return {"rope_type": legacy, **values}


def _shape(config: Any, stated: Mapping[str, Any]) -> ModelShape:
    """The shape of a config that has no `_obstacles`, its context cut to its sliding window."""
    own = stated if stated["model_type"] in NEMOTRON_TYPES else {}  # ours state qkv_bias, newer NVIDIA's o_proj_bias
    rope, kind = _rope(config), config.model_type
    scaling = None
    if rope["rope_type"] in ROPE_KEYS:
        known = ("rope_type", *(key for keys in ROPE_KEYS[rope["rope_type"]] for key in keys))
        scaling = {key: rope[key] for key in known if rope.get(key) is not None}
        if rope["rope_type"] != "linear":
            scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if kind != "mistral" and "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        window = None
    attention_bias = bool(getattr(config, "attention_bias", False)) and kind in ("llama", "qwen3")
    return ModelShape(
        **{key: getattr(config, key) for key in _SAME},
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_position_embeddings=min(config.max_position_embeddings, window or config.max_position_embeddings),
        rope_theta=rope["rope_theta"] if rope.get("rope_theta") else config.rope_theta,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=attention_bias or kind == "qwen2" if own.get("qkv_bias") is None else own["qkv_bias"],
        o_bias=attention_bias if own.get("o_proj_bias") is None else own["o_proj_bias"],
        mlp_bias=bool(getattr(config, "mlp_bias", False)) and kind == "llama",
        qk_norm=own.get("qk_norm", kind == "qwen3"),
        rope_scaling=scaling,
    )
