"""A trained model in a Hugging Face directory: the shape that its config states, and its weights.

transformers reads the config, so that every model type has defaults of its own. A config that asks for what our decoder
does not compute is refused, and code that a checkpoint brings along is never run.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas import console
from nas.errors import UserError, in_short
from nas.files import file_hash, read_json, value_hash, write_atomically
from nas.model.alignment import REVISION, align
from nas.model.decoder import Decoder, untied
from nas.model.supernet import Supernet
from nas.shape import ROPE_KEYS, ModelShape
from nas.space import SearchSpace, Vector, load_space, shipped_spaces

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
NEMOTRON_TYPES = ("nemotron-nas", "nemotron-nas-qk-norm")  # always with block_configs; the second is our own
UNPADDED = "unpadded_intermediate_size"  # a key of our own exports, whose FFN may be stored wider; engines pass it over
_FFN_MULTIPLE = 256  # to which nemotron-nas rounds up the FFN's width
_SIZES = ("n_heads_in_group", "num_key_value_heads", "ffn_mult", "intermediate_size")  # what a block may choose
_NOT_LLAMAS = ("model_type", "auto_map", "block_configs", "per_layer_config", *_SIZES)
_USUAL = {"gated": (None, True), "hidden_act": (None, "silu")}
_SAME = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "rms_norm_eps")
_COMPUTED = "rotary_emb.inv_freq"  # what old Llama checkpoints store although it follows from their config
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config has been read, and found to be one that our decoder can compute."""

    folder: Path
    shape: ModelShape
    kv_heads: Vector
    in_blocks: bool = False  # it has block_configs

    @cached_property
    def identity(self) -> dict[str, str]:
        """Its name and the hash of its weights; reads all of them once."""
        hashes = [file_hash(file) for file in _weight_files(self.folder)]
        return {"name": self.folder.resolve().name, "hash": value_hash(hashes, 64)}

    def space(self) -> SearchSpace:
        """The space that suits it: in each layer all divisors of its K/V heads, so that the largest vector is it."""
        if max(self.kv_heads) == 1:
            raise UserError(
                f"checkpoint {self.folder} has one K/V head in every layer, so there is nothing to choose; give a "
                "checkpoint with more"
            )
        choices = tuple(tuple(g for g in range(1, heads + 1) if heads % g == 0) for heads in self.kv_heads)
        return SearchSpace(self.folder.resolve().name, self.shape, choices)

    def check_space(self, space: SearchSpace) -> None:
        """Refuses a space whose supernet cannot take over these weights (`UserError`); its context may be shorter."""
        for key, wanted in dataclasses.asdict(space.shape).items():
            here = getattr(self.shape, key)
            if wanted != here and not (key == "max_position_embeddings" and wanted < here):
                raise UserError(
                    f"space {space.name} has {key} {wanted} but checkpoint {self.folder} has {here}; change that in "
                    "the space, or leave space= out"
                )
        for layer, (groups, heads) in enumerate(zip(space.largest, self.kv_heads, strict=True)):
            if groups > heads:
                raise UserError(
                    f"space {space.name} allows {groups} groups in layer {layer} but checkpoint {self.folder} has "
                    f"{heads} K/V heads; allow at most that many in kv_groups"
                )

    def model(self, with_weights: bool = True) -> Decoder:
        """The checkpoint as a plain model; without its weights it is on the meta device."""
        with torch.device("cpu" if with_weights else "meta"):
            model = Decoder(self.shape, self.kv_heads)
        if with_weights:
            model.load_state_dict(self._weights())
        return model

    def load_into(self, supernet: Supernet, text: Tensor | None = None, cache: Path | None = None) -> None:
        """Makes the checkpoint's weights the supernet's: see `Supernet.load_plain`, or, with a ``text``, `align`.

        ``text`` are token ids (rows, length). What came of it is kept in the folder ``cache``, so that every process,
        and a run that goes on, starts from the very same weights.
        """
        weights = self._weights()
        if text is None or cache is None:
            supernet.load_plain(weights, self.kv_heads)
            return
        space = supernet.space
        decisive = [REVISION, self.identity["hash"], space.to_dict() | {"known_vectors": None}, text.tolist()]
        file = cache / f"aligned-{value_hash(decisive)}.safetensors"
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                model = Decoder(space.shape, self.kv_heads)
                model.load_state_dict(weights)
                model.to(device)
                layers = align(model, space.choices, text.to(device))
                state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." in name}
                for layer, by_choice in enumerate(layers):
                    for name in by_choice[space.largest[layer]]:
                        stored = torch.cat([by_choice[groups][name] for groups in space.choices[layer]])
                        state[f"model.layers.{layer}.self_attn.{name}"] = stored
                state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
                write_atomically(file, lambda path: save_file(state, path))
        try:
            aligned = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is corrupt ({in_short(error)}); remove it") from None
        supernet.decoder.load_state_dict({**supernet.decoder.state_dict(), **weights, **aligned})

    def _weights(self) -> dict[str, Tensor]:
        """The weights in fp32, by the names that every supported type has for them, and our decoder too."""
        wanted = self.model(with_weights=False).state_dict()
        found = {name: x for file in _weight_files(self.folder) for name, x in load_file(file).items()}
        if other := next((name for name, x in found.items() if x.dtype not in _DTYPES), None):
            kind = str(found[other].dtype).removeprefix("torch.")
            raise UserError(f"checkpoint {self.folder} has {other} in {kind}; give weights in fp32, bf16 or fp16")
        found = {name: x.float() for name, x in found.items()}
        if not any(name.startswith("model.") for name in found):  # a base model's, perhaps with a head beside it
            found = {name if name == "lm_head.weight" else f"model.{name}": x for name, x in found.items()}
        if self.shape.tie_word_embeddings and "lm_head.weight" in found:  # which of the two is stored is free
            found.setdefault("model.embed_tokens.weight", found["lm_head.weight"])
        wanted, found = untied(self.shape, wanted), untied(self.shape, found)
        for name in [name for name in wanted.keys() & found.keys() if self.in_blocks and ".mlp." in name]:
            padded = padded_ffn_width(self.shape.intermediate_size) in found[name].shape
            if padded and found[name].dim() == wanted[name].dim():  # without what an export added
                found[name] = found[name][tuple(map(slice, wanted[name].shape))]
        found = {name: x for name, x in found.items() if not name.endswith(_COMPUTED)}
        if problem := next(_problems(wanted, found), None):
            raise UserError(
                f"the weights of checkpoint {self.folder} do not fit its config.json: {problem}; restore it"
            )
        if self.shape.tie_word_embeddings:
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        return found


def padded_ffn_width(width: int) -> int:
    """The width at which nemotron-nas stores an FFN: 2/3 · ffn_mult · hidden_size, rounded up to a multiple of 256."""
    return math.ceil(width / _FFN_MULTIPLE) * _FFN_MULTIPLE


def resolve_space(reference: str) -> SearchSpace:
    """The space of a shipped name, of a YAML file, or the one that suits the checkpoint in a directory."""
    if reference not in shipped_spaces() and Path(reference).is_dir():
        return read_checkpoint(Path(reference)).space()
    return load_space(reference)


def read_checkpoint(folder: Path, with_weights: bool = True) -> Checkpoint:
    """Reads a checkpoint's config and looks whether its weights are there; one that we cannot compute is refused."""
    if not (folder / "config.json").is_file():
        raise UserError(f"checkpoint {folder} has no config.json; give the directory of a Hugging Face model")
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
    files = _weight_files(folder) if with_weights else []
    if shape.tie_word_embeddings and not _has_tied_weights(files):
        shape = dataclasses.replace(shape, tie_word_embeddings=False)
    if shape.max_position_embeddings < config.max_position_embeddings:
        console.print(
            f"Checkpoint {folder} attends over a sliding window of {config.sliding_window} tokens: its context of "
            f"{config.max_position_embeddings} is cut to that, within which it computes the same"
        )
    return Checkpoint(folder, shape, kv_heads, in_blocks)


def _transformers() -> Any:
    """The library, which is heavy to import, with its own messages off: what matters is in our sentences."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _config(folder: Path, stated: Mapping[str, Any], in_blocks: bool) -> tuple[Any, Vector]:
    """A config with transformers' defaults, and the K/V heads of each layer. Where there are blocks, they decide."""
    if stated["model_type"] in NEMOTRON_TYPES:  # a Llama but for its blocks
        own = {key: value for key, value in stated.items() if key not in _NOT_LLAMAS and value is not None}
        config = _transformers().LlamaConfig(**own)
    else:
        config = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not in_blocks:
        return config, (config.num_key_value_heads,) * config.num_hidden_layers
    heads, kv_heads, blocks = config.num_attention_heads, [], stated["block_configs"]
    if len(blocks) != config.num_hidden_layers:
        raise ValueError(f"block_configs lists {len(blocks)} layers, not num_hidden_layers of them")
    for block in blocks:
        attention, ffn = block["attention"], block["ffn"]
        kv_heads.append(attention.get("num_key_value_heads") or heads / attention["n_heads_in_group"])
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


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights, each with a header that fits its length."""
    file = folder / _INDEX
    sharded = file.is_file() and not (folder / _WEIGHTS).is_file()
    try:
        names = sorted(set(read_json(file)["weight_map"].values())) if sharded else [_WEIGHTS]
        for name in names:
            file = folder / name
            safe_open(file, "pt")  # reads its header
    except (KeyError, AttributeError, TypeError, OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read ({in_short(error)}); a checkpoint has its weights as safetensors: restore them or "
            "download them again"
        ) from None
    return [folder / name for name in names]


def _has_tied_weights(files: Sequence[Path]) -> bool:
    """Whether a head that is stored too is the embedding; if it is not, both count, whatever the config states."""
    found: dict[str, Tensor] = {}
    for file in files:
        tensors: Any = safe_open(file, "pt")
        for name in {"lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight"}.intersection(tensors.keys()):
            found[name] = tensors.get_tensor(name)
    return len(found) < 2 or torch.equal(*found.values())


def _problems(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with stored weights: their names, their shapes, or their values."""
    yield from (f"{name} is missing" for name in sorted(wanted.keys() - found.keys()))
    misshaped = (name for name in sorted(wanted) if found[name].shape != wanted[name].shape)
    yield from (f"{name} has another shape than {tuple(wanted[name].shape)}" for name in misshaped)
    yield from (f"{name} has no place in the model" for name in sorted(found.keys() - wanted.keys()))
    yield from (f"{name} has values that are not finite" for name, x in found.items() if not x.isfinite().all())
