"""nas train: text in, supernet out."""

import dataclasses
import math
import shutil
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nas import console
from nas.config import TRAINED_LEARNING_RATE, SupernetConfig, Train, build
from nas.data import TokenData, prepare_tokens, training_batch, validation_windows
from nas.data.tokenizer import check_vocabulary, copy_companions, tokenizer_file
from nas.distributed import IS_MAIN, broadcast
from nas.errors import UserError
from nas.files import value_hash
from nas.model import Supernet
from nas.model.pretrained import Checkpoint, read_checkpoint, resolve_space
from nas.model.sharing import DEFAULT_SHARING, INIT_SHARING
from nas.model.supernet import load_supernet, save_supernet
from nas.quality import InheritedLoss, LossMemo, evaluated_in, vector_losses
from nas.run import FinishedRun, find_runs, start_run
from nas.space import SearchSpace
from nas.training.heads import train_smaller_heads, with_trained_heads
from nas.training.loop import CHECKPOINT, autocast, computed_in, fit, full_state_dict, training_device
from nas.training.recipes import check_recipe, check_training_memory, supernet_loss, window_length

_ONLY_WATCHING = ("log_every", "validate_every", "validation_windows", "checkpoint_every")


def run(config: Train, path: Path) -> None:
    """Trains a supernet into ``path``."""
    Training(config).make(path)


class Training:
    """A command's supernet: its space, the checkpoint it starts from, and options and tokenizer that suit both."""

    def __init__(self, config: Train) -> None:
        self._config = config
        source = config.init.checkpoint
        self.init = init = read_checkpoint(Path(source)) if source else None
        if init and config.space in (None, source):
            self.space = init.space()
        else:
            self.space = resolve_space(config.space or "tiny")
            if init:
                init.check_space(self.space)
        self.tokenizer = config.tokenizer or (str(init.folder / "tokenizer.json") if init else None)
        if init and config.tokenizer and (own := init.folder / "tokenizer.json").is_file():
            check_vocabulary(config.tokenizer, own)
        self.options = _resolved(config.train, init, self.space)
        check_recipe(self.options)
        if config.init.align not in (None, "auto"):
            raise UserError(f"init.align is '{config.init.align}'; use auto or null")
        self._alignment: dict[str, Any] = {}
        if config.init.align and self.options.sharing == INIT_SHARING:
            self._alignment = {"align": config.init.align, "calibration_tokens": config.init.calibration_tokens}

    def check_memory(self) -> None:
        """Refuses what cannot be trained here; cheap, so that it can come before any text is read."""
        space, options = self.space, self.options
        with torch.device("meta"):
            supernet = Supernet(space, options.sharing, options.output_rank)
        if options.trainable == "kv":
            train_smaller_heads(supernet, computed_in(options.precision, training_device()))
        check_training_memory(f"space {space.name}", options, supernet.decoder, space.largest)

    @cached_property
    def data(self) -> TokenData:
        """The tokens, read when they are first asked for."""
        corpus, cache = build(self._config.data), Path(self._config.runs_dir) / "cache"
        return prepare_tokens(corpus, self.tokenizer, self.space.shape.vocab_size, cache)

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """The config of the train run."""
        options = dataclasses.asdict(self.options)
        if not options["output_rank"]:
            del options["output_rank"]  # of which runs that were begun earlier know nothing
        return {
            "space": {"name": self.space.name, **self.space.to_dict()},
            "init": self.init.identity | self._alignment if self.init else None,
            "data": {**self._config.data, "digest": self.data.digest},
            "tokenizer": self.tokenizer,
            "train": options,
        }

    def make(self, path: Path, free: Collection[str] = ()) -> None:
        """Trains into ``path``, or goes on with an unfinished run there; ``free`` is as in `start_run`."""
        space, options, init, device = self.space, self.options, self.init, training_device()
        self.check_memory()
        length = window_length(options, space.shape.max_position_embeddings)
        windows = validation_windows(self.data.validation, options.validation_windows, length).to(device)
        named = {"largest": space.largest, "middle": space.middle, "smallest": space.smallest}

        def validate() -> dict[str, float]:
            with autocast(options.precision, device):
                losses = dict(zip(named, vector_losses(supernet, list(named.values()), windows), strict=True))
            console.print("  validation loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
            return {f"{name}_loss_nats": loss for name, loss in losses.items()}

        with start_run(path, "train", self.recorded, {"train": options.seed}, free=free) as run:
            vectors = f"{space.name} ({space.size:,} vectors)"
            start = f"the weights of {init.folder}" if init else "random weights"
            console.print(f"Training {vectors} from {start} for {options.steps} steps in {path}")
            supernet = Supernet(space, options.sharing, options.output_rank)
            if init:
                load_checkpoint(init, supernet, self.recorded, self.data, Path(self._config.runs_dir) / "cache")
            else:
                supernet.initialise(torch.Generator().manual_seed(options.seed))
            first = supernet.decoder.state_dict() if options.trainable == "kv" else {}
            if options.trainable == "kv":
                train_smaller_heads(supernet, computed_in(options.precision, device))
            fit(supernet, supernet_loss(space, self.data.train, options, length), options, run, validate)
            state = full_state_dict(supernet.decoder)
            if IS_MAIN:
                state = with_trained_heads(first, state) if options.trainable == "kv" else state
                save_supernet(space, options.sharing, options.output_rank, state, path)
                shutil.copy(self.data.tokenizer, path / "tokenizer.json")
                if self.tokenizer:
                    copy_companions(tokenizer_file(self.tokenizer), path)
            run.finish(scaffold=path / CHECKPOINT)
        broadcast(None)  # that it is finished


def _resolved(given: SupernetConfig, init: Checkpoint | None, space: SearchSpace) -> SupernetConfig:
    """The options with what ``auto`` and null mean for this start and space."""
    sharing = (INIT_SHARING if init else DEFAULT_SHARING) if given.sharing == "auto" else given.sharing
    rate = TRAINED_LEARNING_RATE if init and given.learning_rate is None else given.peak_learning_rate
    obstacle = _obstacle_to_kv(init, sharing, space)
    trainable = ("all" if obstacle else "kv") if given.trainable == "auto" else given.trainable
    if trainable == "kv" and obstacle:
        raise UserError(f"train.trainable is kv, {obstacle}, or give train.trainable=all")
    options = dataclasses.replace(given, sharing=sharing, learning_rate=rate, trainable=trainable)
    if trainable == "kv":  # nothing of the largest vector is trained
        options = dataclasses.replace(options, largest_share=0.0, largest_first=0.0)
    return dataclasses.replace(options, distillation_weight=options.distilled_share)


def _obstacle_to_kv(init: Checkpoint | None, sharing: str, space: SearchSpace) -> str | None:
    """Why the smaller choices' heads cannot be trained alone, as they follow the checkpoint, and how to change that."""
    if init is None or sharing != INIT_SHARING:
        return "which needs init= and train.sharing=separate; give both"
    if space.largest != init.kv_heads:
        return (
            f"but the largest vector of space {space.name} is not checkpoint {init.folder}, which has "
            f"{' or '.join(map(str, sorted(set(init.kv_heads))))} K/V heads in its layers; allow as many in kv_groups"
        )
    if space.size == 1:
        return f"but space {space.name} has no smaller choices to train; allow several in kv_groups"
    return None


def load_checkpoint(
    init: Checkpoint, supernet: Supernet, recorded: Mapping[str, Any], data: TokenData, cache: Path
) -> None:
    """Starts a supernet from a checkpoint, as the ``recorded`` config of its train run says."""
    text, options = None, recorded["train"]
    if recorded["init"].get("align"):
        tokens = recorded["init"]["calibration_tokens"]
        length = min(options["length"] or supernet.space.shape.max_position_embeddings, tokens)
        rows = math.ceil(tokens / length)
        text = training_batch(data.train, options["seed"], 0, rows, length)[:, :-1]
    init.load_into(supernet, text, cache)


def supernet_identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a train run's config that decides the weights: text and checkpoint by content, and no names."""
    return {
        "space": {key: value for key, value in config["space"].items() if key not in ("name", "known_vectors")},
        "init": {key: value for key, value in (config.get("init") or {}).items() if key != "name"},
        "data": config["data"]["digest"],
        "train": weights_identity({"trainable": "all"} | config["train"]),  # older runs knew nothing else
    }


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
    device = training_device()
    decisive = [supernet.digest(), list(windows_NT.shape), data.digest]
    decisive += [in_half] if (in_half := evaluated_in(device)) != "fp32" else []  # which it always was once
    memo = LossMemo(runs_dir / "cache" / f"losses-{value_hash(decisive)}.jsonl")
    return InheritedLoss(load_supernet(supernet, device), windows_NT, memo)
