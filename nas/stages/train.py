"""nas train: text in, supernet out."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from nas import console
from nas.config import TRAINED_LEARNING_RATE, SupernetConfig, Train, build
from nas.data import TokenData, prepare_tokens, validation_windows
from nas.distributed import IS_MAIN, broadcast
from nas.files import value_hash
from nas.model import Supernet
from nas.model.checkpoint import load_supernet, save_supernet
from nas.model.pretrained import Checkpoint, read_checkpoint, resolve_space
from nas.model.sharing import DEFAULT_SHARING, INIT_SHARING
from nas.quality import InheritedLoss, LossMemo, vector_losses
from nas.run import FinishedRun, find_runs, start_run
from nas.space import SearchSpace
from nas.training import check_memory, fit, full_state_dict, supernet_loss, training_device, window_length
from nas.training.loop import CHECKPOINT, autocast
from nas.training.recipes import check_recipe

Parts = TypeVar("Parts", bound=Train)

_ONLY_WATCHING = ("log_every", "validate_every", "validation_windows", "checkpoint_every")


def run(config: Train, path: Path) -> None:
    """Trains a supernet into ``path``."""
    config, space, init = resolve(config)
    check_trainable(config.train, space)
    train_supernet(config, space, init, supernet_data(config, space), path)


def resolve(config: Parts) -> tuple[Parts, SearchSpace, Checkpoint | None]:
    """Reads the space and the checkpoint of a command, and sets the tokenizer, sharing rule and learning rate by them.

    Raises:
        UserError: There is no such space or checkpoint, it is not supported, or they do not fit each other.
    """
    init = read_checkpoint(Path(config.init)) if config.init else None
    if init and config.space in (None, config.init):
        space = init.space()
    else:
        space = resolve_space(config.space or "tiny")
        if init:
            init.check_space(space)
    options = config.train
    sharing = (INIT_SHARING if init else DEFAULT_SHARING) if options.sharing == "auto" else options.sharing
    rate = TRAINED_LEARNING_RATE if init and options.learning_rate is None else options.peak_learning_rate
    options = dataclasses.replace(options, sharing=sharing, learning_rate=rate)
    tokenizer = config.tokenizer or (str(init.folder / "tokenizer.json") if init else None)
    return dataclasses.replace(config, train=options, tokenizer=tokenizer), space, init


def supernet_data(config: Train, space: SearchSpace) -> TokenData:
    """The tokens that a supernet of ``space`` is trained and validated on."""
    vocabulary = space.shape.vocab_size
    return prepare_tokens(build(config.data), config.tokenizer, vocabulary, Path(config.runs_dir) / "cache")


def supernet_config(config: Train, space: SearchSpace, init: Checkpoint | None, data: TokenData) -> dict[str, Any]:
    """What a train run records; ``config`` is resolved."""
    return {
        "space": {"name": space.name, **space.to_dict()},
        "init": init.identity if init else None,
        "data": {**config.data, "digest": data.digest},
        "tokenizer": config.tokenizer,
        "train": dataclasses.asdict(config.train),
    }


def supernet_identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a train run's config that decides the weights: text and checkpoint by content, and no names."""
    return {
        "space": space_identity(config["space"]),
        "init": (config.get("init") or {}).get("hash"),
        "data": config["data"]["digest"],
        "train": weights_identity(config["train"]),
    }


def space_identity(space: dict[str, Any]) -> dict[str, Any]:
    """The part of a recorded space that decides a supernet's weights: without its own name and those of vectors."""
    return {key: value for key, value in space.items() if key not in ("name", "known_vectors")}


def weights_identity(train: dict[str, Any]) -> dict[str, Any]:
    """The options of a training that decide the weights."""
    return {key: value for key, value in train.items() if key not in _ONLY_WATCHING}


def find_supernet(runs_dir: Path, config: dict[str, Any]) -> FinishedRun | None:
    """The train run with the same `supernet_identity` that finished first: a resumed search must find it again."""
    same = [run for run in find_runs(runs_dir, "train") if supernet_identity(run.config) == supernet_identity(config)]
    return same[-1] if same else None


def inherited_loss(supernet: FinishedRun, data: TokenData, windows: int, runs_dir: Path) -> InheritedLoss:
    """The inherited loss of a supernet's vectors, on so many validation windows as long as those it was trained on."""
    length = supernet.config["train"]["length"] or supernet.config["space"]["max_position_embeddings"]
    windows_NT = validation_windows(data.validation, windows, length)
    name = f"losses-{value_hash([supernet.digest(), list(windows_NT.shape), data.digest])}.jsonl"
    return InheritedLoss(load_supernet(supernet, training_device()), windows_NT, LossMemo(runs_dir / "cache" / name))


def train_supernet(
    config: Train,
    space: SearchSpace,
    init: Checkpoint | None,
    data: TokenData,
    path: Path,
    decisive: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Trains a supernet of ``space`` into ``path``, or goes on with an unfinished one there.

    The arguments are what `resolve` and `supernet_data` returned; ``decisive`` is as in `start_run`.
    """
    options = config.train
    check_trainable(options, space)
    device = training_device()
    length = window_length(options, space.shape.max_position_embeddings)
    windows = validation_windows(data.validation, options.validation_windows, length).to(device)
    seeds = {"train": options.seed}
    with start_run(path, "train", supernet_config(config, space, init, data), seeds, decisive=decisive) as run:
        start = f"the weights of {init.folder}" if init else "random weights"
        console.print(
            f"Training {space.name} ({space.size:,} vectors) from {start} for {options.steps} steps in {path}"
        )
        supernet = Supernet(space, options.sharing)
        if init:
            init.load_into(supernet)
        else:
            supernet.initialise(torch.Generator().manual_seed(options.seed))

        def validate() -> dict[str, float]:
            named = {"largest": space.largest, "middle": space.middle, "smallest": space.smallest}
            with autocast(options.precision, device):
                losses = dict(zip(named, vector_losses(supernet, list(named.values()), windows), strict=True))
            console.print("  validation loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
            return {f"{name}_loss_nats": loss for name, loss in losses.items()}

        fit(supernet, supernet_loss(space, data.train, options, length), options, run, validate)
        state = full_state_dict(supernet.decoder)
        if IS_MAIN:
            save_supernet(space, options.sharing, state, path)
            shutil.copy(data.tokenizer, path / "tokenizer.json")
        run.finish(scaffold=path / CHECKPOINT)
    broadcast(None)  # that it is finished


def check_trainable(options: SupernetConfig, space: SearchSpace) -> None:
    """Refuses what cannot be trained here; cheap, so that it can come before any text is read."""
    check_recipe(options)
    check_memory(f"space {space.name}", options, space.shape, space.largest)
