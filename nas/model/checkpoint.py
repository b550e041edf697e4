"""A supernet on disk: weights as safetensors, the space and the sharing rule as JSON."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas.errors import UserError, in_short
from nas.files import read_json, write_atomically, write_json
from nas.model.supernet import Supernet
from nas.run import FinishedRun
from nas.space import SearchSpace, space_from_dict

_WEIGHTS, _CONFIG = "supernet.safetensors", "supernet.json"


def save_supernet(space: SearchSpace, sharing: str, state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the two files into ``folder``; ``state`` is the decoder's."""
    tied = {"lm_head.weight"} if space.shape.tie_word_embeddings else set()
    kept = {name: tensor.cpu().contiguous() for name, tensor in state.items() if name not in tied}
    write_atomically(folder / _WEIGHTS, lambda path: save_file(kept, path))
    write_json(folder / _CONFIG, {"name": space.name, "space": space.to_dict(), "sharing": sharing})


def load_supernet(run: FinishedRun, device: torch.device) -> Supernet:
    """Loads the supernet of a finished train run."""
    weights, config = run.artifact(_WEIGHTS), read_json(run.artifact(_CONFIG))
    try:
        supernet = Supernet(space_from_dict(config["name"], config["space"]), config["sharing"])
        state = load_file(weights)
        if supernet.space.shape.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        supernet.decoder.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"supernet {run.path} is corrupt ({in_short(error)}); train it again") from None
    return supernet.to(device)
