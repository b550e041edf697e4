"""nas finetune: goes on training exported models, in the same loop as the supernet, and exports them again.

Of an export run all vectors are trained, each on the same batches:

front_trained.csv  their losses, inherited and trained, and how the training changed their order
trainings/         metrics of every training
"""

import dataclasses
import gc
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nas import console
from nas.config import Finetune, build
from nas.data import prepare_tokens, validation_windows
from nas.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_file
from nas.distributed import IS_MAIN, broadcast
from nas.errors import UserError
from nas.export import exporters
from nas.export.hf import CONFIG, HfExporter, weight_files
from nas.files import file_hash, value_hash, write_csv
from nas.model import Decoder
from nas.model.pretrained import Checkpoint, read_checkpoint
from nas.quality import LossMemo, plain_losses
from nas.ranking import compare_trained, order_sentence
from nas.run import FinishedRun, Run, origin, start_run
from nas.space import format_vector
from nas.stages.export import exported_models, open_checkpoint
from nas.training.heads import freeze
from nas.training.loop import CHECKPOINT, computed_in, fit, full_state_dict, training_device
from nas.training.recipes import Distillation, check_training_memory, text_loss, window_length

_WHEN = ("before", "after")


def run(config: Finetune, path: Path) -> None:
    """Finetunes one model into ``path``/model, or all vectors of an export run into a folder of ``path`` each."""
    sources, parents = _sources(config)
    trainings = Trainings(config, sources)
    with start_run(path, "finetune", trainings.recorded, {"train": config.train.seed}, parents) as run:
        memo = LossMemo(path / "losses.jsonl")
        for number, (name, vector) in enumerate(zip(sources, trainings.vectors, strict=True)):
            one = Run(path / "trainings" / name) if config.run else run
            names = [f"{name} {when}" for when in _WHEN]
            if not broadcast(names[-1] in memo):  # else it was finished before an interruption
                one.path.mkdir(parents=True, exist_ok=True)
                losses = trainings.train(name, one, path)
                gc.collect()  # the trained model's layers refer to themselves
                before, after = losses.double().mean(1).tolist()
                if config.run:
                    run.log(step=number, vector=vector, loss_before_nats=before, loss_after_nats=after)
                if IS_MAIN:
                    windows = dict(zip(names, losses.numpy(), strict=True))
                    memo.add(dict(zip(names, (before, after), strict=True)), windows)
            if IS_MAIN:
                (one.path / CHECKPOINT).unlink(missing_ok=True)
        if config.run and IS_MAIN:
            losses_VN = [np.stack([memo.windows[f"{name} {when}"] for name in sources]).astype(float) for when in _WHEN]
            table = compare_trained(trainings.vectors, *losses_VN)
            write_csv(path / "front_trained.csv", table.assign(**origin()))
            console.print(f"{order_sentence(table)}: {path / 'front_trained.csv'}")
        run.finish()


def _sources(config: Finetune) -> tuple[dict[str, Path], dict[str, FinishedRun]]:
    """The directories of the models to train, by the names that they get, and the run that wrote them as parent."""
    if (config.run is None) == (config.checkpoint is None):
        raise UserError(
            "give either checkpoint=DIR, an exported model, or run=RUN, a nas export run, all of its vectors"
        )
    if config.checkpoint is not None:
        source, parents = open_checkpoint(config.checkpoint, with_weights=not config.from_scratch)
        return {"model": source}, parents
    if config.from_scratch:
        raise UserError("from_scratch=true takes no inherited weights, so nothing is compared; give one checkpoint=")
    export = FinishedRun(Path(str(config.run)), "export")
    folders = exported_models(export.path)
    if not folders:
        raise UserError(f"{export.path} has no models in Hugging Face's format; export them again with export=hf")
    return {folder.name: open_checkpoint(str(folder))[0] for folder in folders}, {"export": export}


class Trainings:
    """Trainings that are alike but for the model, by the names of those: all have one shape."""

    def __init__(self, config: Finetune, sources: dict[str, Path]) -> None:
        self._config, self._sources, self._options = config, sources, config.train
        self._formats, self._device = exporters(config.export), training_device()
        if any(exporter.of_served for exporter, _ in self._formats):
            raise UserError(
                "export has a format without weights, and nas finetune trains weights; use export=hf, gguf, uniform or "
                "modelopt, and nas export for the others"
            )
        if not config.distill and (config.distillation_weight, config.distillation_temperature) != (1.0, 1.0):
            raise UserError("distillation_weight and distillation_temperature belong to a teacher; give distill=DIR")
        self._teacher = teacher = read_checkpoint(Path(config.distill)) if config.distill else None
        followed = teacher.shape.parameters(teacher.kv_heads) if teacher else 0
        models = {source: HfExporter().read(source, with_weights=False) for source in sources.values()}
        for source, model in models.items():
            check_training_memory(f"checkpoint {source}", config.train, model, model.kv_heads, followed)
        self.vectors = [format_vector(model.kv_heads) for model in models.values()]
        source, model = next(iter(models.items()))
        self._shape = model.shape
        self._length = window_length(config.train, self._shape.max_position_embeddings)
        own = source / "tokenizer.json"
        tokenizer = config.tokenizer or (str(own) if own.is_file() else None)
        if config.tokenizer and own.is_file() and not config.from_scratch:
            check_vocabulary(config.tokenizer, own)
        cache = Path(config.runs_dir) / "cache"
        self._data = prepare_tokens(build(config.data), tokenizer, self._shape.vocab_size, cache)
        # its special tokens lie beside the tokenizer that was given
        self._tokenizer = tokenizer_file(tokenizer) if tokenizer else self._data.tokenizer
        windows = validation_windows(self._data.validation, config.train.validation_windows, self._length)
        self._windows = windows.to(self._device)
        for exporter, _ in self._formats:
            exporter.check(self._shape, self._data.tokenizer)
        if teacher:
            self._check(teacher)

    def _check(self, teacher: Checkpoint) -> None:
        """Refuses a teacher that cannot read the same tokens."""
        own, there, file = self._shape.vocab_size, teacher.shape.vocab_size, teacher.folder / "tokenizer.json"
        reader = file if file.is_file() else self._data.tokenizer
        words, others = (load_tokenizer(str(each)).get_vocab() for each in (self._data.tokenizer, reader))
        if own != there or words != others:
            raise UserError(
                f"distill={teacher.folder} has another vocabulary ({there} tokens) than the model that it is to teach "
                f"({own}); give a teacher with the same tokenizer"
            )
        if (context := teacher.shape.max_position_embeddings) < self._length:
            raise UserError(f"train.length is {self._length} but distill={teacher.folder} has a context of {context}")

    @property
    def recorded(self) -> dict[str, object]:
        """The config of the run."""
        config, (first, *_) = self._config, self._sources.values()
        taught = {}
        if self._teacher:
            numbers = {"weight": config.distillation_weight, "temperature": config.distillation_temperature}
            taught = {"distill": self._teacher.identity | numbers}
        return {
            **({"run": Path(config.run).name} if config.run else {"checkpoint": _identity(first)}),
            "from_scratch": config.from_scratch,
            "data": {**config.data, "digest": self._data.digest},
            "train": dataclasses.asdict(config.train),
            "export": config.export,
            **taught,
        }

    @cached_property
    def _followed(self) -> tuple[Decoder, Distillation] | None:
        if not self._teacher:
            return None
        model = self._teacher.model()
        freeze(model, computed_in(self._options.precision, self._device))
        weight, temperature = self._config.distillation_weight, self._config.distillation_temperature
        return model.to(self._device), Distillation(weight, temperature, self._options.compile)

    def train(self, name: str, run: Run, path: Path) -> Tensor:
        """Trains one model and exports it into ``path``; its losses on the validation windows (2, N), before and after.

        Its metrics, and while it lasts its checkpoint, are those of ``run``.
        """
        source, options, windows = self._sources[name], self._options, self._windows
        model = HfExporter().read(source, with_weights=not self._config.from_scratch)
        if self._config.from_scratch:
            model = Decoder(model.shape, model.kv_heads)
            model.initialise(torch.Generator().manual_seed(options.seed))
        start = "fresh weights" if self._config.from_scratch else "inherited weights"
        vector = format_vector(model.kv_heads)
        console.print(f"Training {vector} from {start} for {options.steps} steps in {run.path}")
        model.to(self._device)
        losses = [plain_losses(model, windows)]

        def validate() -> dict[str, float]:  # in fp32: small differences count
            losses[1:] = [plain_losses(model, windows)]
            return {"validation_loss_nats": float(losses[1].double().mean())}

        fit(model, text_loss(self._data.train, options, self._length, self._followed), options, run, validate)
        before, after = torch.stack(losses).double().mean(1).tolist()
        state = full_state_dict(model)
        if IS_MAIN:
            trained = Decoder(model.shape, model.kv_heads)
            trained.load_state_dict(state)
            card = {
                "KV groups by layer": vector,
                "validation loss before": f"{before:.5f} nats/token, with {start} (measured)",
                "validation loss after": f"{after:.5f} nats/token, after {options.steps} more steps (measured)",
                "trained from": f"{source.name} ({_weights(source)[0].name} {_identity(source)['hash'][:12]})",
            }
            if self._teacher:
                card["distilled from"] = "{name} ({hash:.12})".format(**self._teacher.identity)
            for exporter, below in self._formats:
                exporter.write(trained, self._tokenizer, path / below / name, card)
        at = path / self._formats[0][1] / name
        console.print(f"Validation loss {before:.4f} before, {after:.4f} after; exported {at}")
        return torch.stack(losses).cpu()


def _weights(source: Path) -> list[Path]:
    return weight_files(source) or [source / CONFIG]


def _identity(source: Path) -> dict[str, str]:
    """Name of a model and hash of its weights, or of its config if it has none."""
    hashes = [file_hash(file) for file in _weights(source)]
    return {"name": source.name, "hash": hashes[0] if len(hashes) == 1 else value_hash(hashes, 64)}
