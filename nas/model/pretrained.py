"""A trained model in a Hugging Face directory: its weights, and how a supernet starts from them.

Code that a checkpoint brings along is never run.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas.errors import UserError, in_short
from nas.files import file_hash, read_json, value_hash, write_atomically
from nas.model.alignment import REVISION, align
from nas.model.config_json import padded_ffn_width, read_config
from nas.model.decoder import Decoder, untied
from nas.model.supernet import Supernet
from nas.shape import ModelShape
from nas.space import SearchSpace, Vector, load_space, shipped_spaces

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
                write_atomically(file, partial(save_file, self._aligned(weights, space, text)))
        try:
            aligned = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is corrupt ({in_short(error)}); remove it") from None
        supernet.decoder.load_state_dict({**supernet.decoder.state_dict(), **weights, **aligned})

    def _aligned(self, weights: Mapping[str, Tensor], space: SearchSpace, text: Tensor) -> dict[str, Tensor]:
        """What `align` makes of the attentions' weights, by their names in a supernet of separate heads."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Decoder(space.shape, self.kv_heads)
        model.load_state_dict(weights)
        stored = align(model.to(device), space.choices, text.to(device))
        turned = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." in name}
        return {name: tensor.cpu().contiguous() for name, tensor in (turned | stored).items()}

    def _weights(self) -> dict[str, Tensor]:
        """The weights in fp32, by the names that every supported type has for them, and our decoder too."""
        wanted = untied(self.shape, self.model(with_weights=False).state_dict())
        found = {name: x for file in _weight_files(self.folder) for name, x in load_file(file).items()}
        if other := next((name for name, x in found.items() if x.dtype not in _DTYPES), None):
            kind = str(found[other].dtype).removeprefix("torch.")
            raise UserError(f"checkpoint {self.folder} has {other} in {kind}; give weights in fp32, bf16 or fp16")
        found = {name: x.float() for name, x in found.items() if not name.endswith(_COMPUTED)}
        if not any(name.startswith("model.") for name in found):  # a base model's, perhaps with a head beside it
            found = {name if name == "lm_head.weight" else f"model.{name}": x for name, x in found.items()}
        if self.shape.tie_word_embeddings and "lm_head.weight" in found:  # which of the two is stored is free
            found.setdefault("model.embed_tokens.weight", found["lm_head.weight"])
        found = untied(self.shape, found)
        for name in [name for name in wanted.keys() & found.keys() if self.in_blocks and ".mlp." in name]:
            padded = padded_ffn_width(self.shape.intermediate_size) in found[name].shape
            if padded and found[name].dim() == wanted[name].dim():  # without what an export added
                found[name] = found[name][tuple(map(slice, wanted[name].shape))]
        if problem := next(_problems(wanted, found), None):
            raise UserError(
                f"the weights of checkpoint {self.folder} do not fit its config.json: {problem}; restore it"
            )
        if self.shape.tie_word_embeddings:
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        return found


def resolve_space(reference: str) -> SearchSpace:
    """The space of a shipped name, of a YAML file, or the one that suits the checkpoint in a directory."""
    if reference not in shipped_spaces() and Path(reference).is_dir():
        return read_checkpoint(Path(reference)).space()
    return load_space(reference)


def read_checkpoint(folder: Path, with_weights: bool = True) -> Checkpoint:
    """Reads a checkpoint's config and looks whether its weights are there; one that we cannot compute is refused."""
    shape, kv_heads, in_blocks = read_config(folder)
    files = _weight_files(folder) if with_weights else []
    if shape.tie_word_embeddings and not _has_tied_weights(files):
        shape = dataclasses.replace(shape, tie_word_embeddings=False)
    return Checkpoint(folder, shape, kv_heads, in_blocks)


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
