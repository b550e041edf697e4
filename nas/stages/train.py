"""nas train: text in, supernet out."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from nas.config import Train, TrainConfig, build
from nas.console import say
from nas.data import TokenData, prepare_tokens, training_batch, validation_windows
from nas.errors import UserError
from nas.model import Supernet
from nas.model.checkpoint import save_supernet
from nas.quality import row_losses, vector_loss
from nas.run import FinishedRun, find_runs, start_run
from nas.space import SearchSpace, load_space
from nas.training import fit, training_device
from nas.training.loop import autocast
from nas.training.recipes import mixed_vectors

_BYTES_A_PARAMETER = 16  # fp32 weight, gradient and two AdamW moments


def run(config: Train, path: Path) -> None:
    """Trains a supernet into ``path``."""
    space = load_space(config.space)
    check_trainable(config.train, space)
    train_supernet(config, space, supernet_data(config, space), path)


def supernet_data(config: Any, space: SearchSpace) -> TokenData:
    """The tokens that a supernet of ``space`` is trained and validated on."""
    vocabulary = space.shape.vocab_size
    return prepare_tokens(build(config.data), config.tokenizer, vocabulary, Path(config.runs_dir) / "cache")


def supernet_config(config: Any, space: SearchSpace, data: TokenData) -> dict[str, Any]:
    """What makes a supernet what it is; two runs with equal ones are the same supernet."""
    return {
        "space": {"name": space.name, **space.to_dict()},
        "data": {**config.data, "digest": data.digest},
        "tokenizer": config.tokenizer,
        "train": dataclasses.asdict(config.train),
    }


def find_supernet(runs_dir: Path, wanted: dict[str, Any]) -> FinishedRun | None:
    """The newest finished train run of this config; the same text under another path is the same data."""

    def identity(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "data": config["data"]["digest"], "tokenizer": None}  # the digest covers the tokenizer

    return next((run for run in find_runs(runs_dir, "train") if identity(run.config) == identity(wanted)), None)


def train_supernet(config: Any, space: SearchSpace, data: TokenData, path: Path) -> FinishedRun:
    """Trains a supernet of ``space`` into ``path``, or goes on with an unfinished one there.

    Args:
        config: Has ``data``, ``tokenizer`` and ``train``: a `Train` or a `Search`.
        space: The search space.
        data: What `supernet_data` returned.
        path: The run directory.

    Raises:
        UserError: See `fit`, `start_run` and `check_trainable`.
    """
    options: TrainConfig = config.train
    check_trainable(options, space)
    device = training_device()
    length = window_length(options, space.shape.max_position_embeddings)
    windows = validation_windows(data.validation, options.validation_windows, length).to(device)
    supernet = Supernet(space, options.sharing)
    seeds = {"train": options.seed}
    with start_run(path, "train", supernet_config(config, space, data), seeds) as run:
        say(f"Training a supernet of {space.name} ({space.size:,} vectors) for {options.steps} steps in {path}")
        supernet.decoder.initialise(torch.Generator().manual_seed(options.seed))
        supernet.to(device)

        def loss_at(step: int) -> Tensor:
            batch = training_batch(data.train, options.seed, step, options.batch, length).to(device, non_blocking=True)
            choices = supernet.choice_indices(mixed_vectors(space, options, step))
            with autocast(options.precision, device):
                return row_losses(supernet(batch[:, :-1], choices), batch[:, 1:]).mean()

        def validate() -> dict[str, float]:
            named = {"largest": space.largest, "middle": space.middle, "smallest": space.smallest}
            with autocast(options.precision, device):
                losses = {name: vector_loss(supernet, vector, windows) for name, vector in named.items()}
            say("  validation loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
            return {f"{name}_loss_nats": loss for name, loss in losses.items()}

        fit(supernet, loss_at, options, run, validate)
        save_supernet(supernet, options.sharing, path)
        shutil.copy(data.tokenizer, path / "tokenizer.json")
        (path / "checkpoint.pt").unlink(missing_ok=True)
        run.finish()
    return FinishedRun(path, "train")


def window_length(options: TrainConfig, context: int) -> int:
    """Tokens of a training window.

    Raises:
        UserError: train.length is beyond the model's context.
    """
    if options.length is not None and options.length > context:
        raise UserError(f"train.length is {options.length} but the model's context is {context}; lower it")
    return options.length or context


def check_trainable(options: TrainConfig, space: SearchSpace) -> None:
    """Refuses what cannot be trained here; cheap, so that it can come before any text is read.

    Raises:
        UserError: train.length is beyond the model's context, the shares of rows exceed 1, or the space is too large
            for this machine.
    """
    window_length(options, space.shape.max_position_embeddings)
    if options.largest_share + options.smallest_share > 1:
        raise UserError(
            f"train.largest_share {options.largest_share} and train.smallest_share {options.smallest_share} are more "
            "than all rows together; lower one"
        )
    device = training_device()
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    needed = space.shape.parameters(space.largest) * _BYTES_A_PARAMETER
    if needed > total:
        raise UserError(
            f"training space {space.name} takes at least {needed / 2**30:.0f} GiB but the {device.type} has "
            f"{total / 2**30:.0f}; take a smaller space or a larger machine"
        )
