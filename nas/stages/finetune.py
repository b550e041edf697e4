"""nas finetune: goes on training exported models, in the same loop as the supernet, and exports them again.

Of an export run all vectors are trained, each on the same batches:

front_trained.csv  their losses, inherited and trained, and how the training changed their order
trainings/         metrics of every training
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from nas import console
from nas.config import Finetune, build
from nas.data import prepare_tokens, validation_windows
from nas.data.tokenizer import tokenizer_file
from nas.distributed import IS_MAIN, broadcast
from nas.errors import UserError
from nas.export import exporters
from nas.export.hf import CONFIG, HfExporter, weight_files
from nas.files import file_hash, value_hash, write_csv
from nas.model import Decoder
from nas.quality import LossMemo, plain_losses
from nas.ranking import compare_trained, order_sentence
from nas.run import FinishedRun, Run, origin, start_run
from nas.space import format_vector
from nas.stages.export import exported_models, open_checkpoint
from nas.training.loop import CHECKPOINT, fit, full_state_dict, training_device
from nas.training.recipes import check_training_memory, text_loss, window_length


def run(config: Finetune, path: Path) -> None:
    """Finetunes one model into ``path``/model, or all vectors of an export run into a folder of ``path`` each."""
    sources, parents = _sources(config)
    formats, options, device = exporters(config.export), config.train, training_device()
    vectors = []
    for source in sources.values():
        model = HfExporter().read(source, with_weights=False)
        check_training_memory(f"checkpoint {source}", options, model.shape, model.kv_heads)
        vectors.append(format_vector(model.kv_heads))
    shape, length = model.shape, window_length(options, model.shape.max_position_embeddings)
    own = source / "tokenizer.json"
    tokenizer = config.tokenizer or (str(own) if own.is_file() else None)
    data = prepare_tokens(build(config.data), tokenizer, shape.vocab_size, Path(config.runs_dir) / "cache")
    windows = validation_windows(data.validation, options.validation_windows, length).to(device)
    for exporter, _ in formats:
        if exporter.of_served:
            raise UserError(
                "export has a format without weights, and nas finetune trains weights; use export=hf, gguf, uniform or "
                "modelopt, and nas export for the others"
            )
        exporter.check(shape, data.tokenizer)
    resolved = {
        **({"run": Path(config.run).name} if config.run else {"checkpoint": _identity(source)}),
        "from_scratch": config.from_scratch,
        "data": {**config.data, "digest": data.digest},
        "train": dataclasses.asdict(options),
        "export": config.export,
    }
    # its special tokens lie beside the tokenizer that was given
    given = tokenizer_file(tokenizer) if tokenizer else data.tokenizer
    start = "fresh weights" if config.from_scratch else "inherited weights"

    def train(source: Path, name: str, run: Run) -> torch.Tensor:
        """Trains one model and exports it by its ``name``; its losses (2, windows), before and after."""
        model = HfExporter().read(source, with_weights=not config.from_scratch)
        if config.from_scratch:
            model = Decoder(shape, model.kv_heads)
            model.initialise(torch.Generator().manual_seed(options.seed))
        vector = format_vector(model.kv_heads)
        console.print(f"Training {vector} from {start} for {options.steps} steps in {run.path}")
        model.to(device)

        losses = [plain_losses(model, windows)]

        def validate() -> dict[str, float]:  # in fp32: small differences count
            losses[1:] = [plain_losses(model, windows)]
            return {"validation_loss_nats": float(losses[1].double().mean())}

        fit(model, text_loss(data.train, options, length), options, run, validate)
        before, after = torch.stack(losses).double().mean(1).tolist()
        state = full_state_dict(model)
        if IS_MAIN:
            trained, identity = Decoder(shape, model.kv_heads), _identity(source)
            trained.load_state_dict(state)
            card = {
                "KV groups by layer": vector,
                "validation loss before": f"{before:.5f} nats/token, with {start} (measured)",
                "validation loss after": f"{after:.5f} nats/token, after {options.steps} more steps (measured)",
                "trained from": f"{source.name} ({_weights(source)[0].name} {identity['hash'][:12]})",
            }
            for exporter, below in formats:
                exporter.write(trained, given, path / below / name, card)
        at = path / formats[0][1] / name
        console.print(f"Validation loss {before:.4f} before, {after:.4f} after; exported {at}")
        return torch.stack(losses).cpu()

    with start_run(path, "finetune", resolved, {"train": options.seed}, parents) as run:
        memo = LossMemo(path / "losses.jsonl")
        for name, source in sources.items():
            at, taken = Run(path / "trainings" / name) if config.run else run, [f"{name} before", f"{name} after"]
            if not broadcast(taken[1] in memo):
                at.path.mkdir(parents=True, exist_ok=True)
                losses = train(source, name, at).numpy()
                if IS_MAIN:
                    means = losses.mean(axis=1, dtype=float).tolist()
                    memo.add(dict(zip(taken, means, strict=True)), dict(zip(taken, losses, strict=True)))
            if IS_MAIN:
                (at.path / CHECKPOINT).unlink(missing_ok=True)
        if config.run and IS_MAIN:
            before, after = (
                np.stack([memo.windows[f"{name} {when}"] for name in sources]) for when in ("before", "after")
            )
            table = compare_trained(vectors, before.astype(float), after.astype(float))
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


def _weights(source: Path) -> list[Path]:
    return weight_files(source) or [source / CONFIG]


def _identity(source: Path) -> dict[str, str]:
    """Name of a model and hash of its weights, or of its config if it has none."""
    hashes = [file_hash(file) for file in _weights(source)]
    return {"name": source.name, "hash": hashes[0] if len(hashes) == 1 else value_hash(hashes, 64)}
