"""nas finetune: goes on training an exported model, in the same loop as the supernet, and exports it again."""

import dataclasses
from pathlib import Path

import torch

from nas import console
from nas.config import Finetune, build
from nas.data import prepare_tokens, validation_windows
from nas.data.tokenizer import tokenizer_file
from nas.distributed import IS_MAIN
from nas.errors import UserError
from nas.export import exporters
from nas.export.hf import CONFIG, HfExporter, weight_files
from nas.files import file_hash, value_hash
from nas.model import Decoder
from nas.quality import mean_loss
from nas.run import start_run
from nas.space import format_vector
from nas.stages.export import open_checkpoint
from nas.training.loop import CHECKPOINT, autocast, fit, full_state_dict, training_device
from nas.training.recipes import check_training_memory, text_loss, window_length


def run(config: Finetune, path: Path) -> None:
    """Finetunes into ``path``/model."""
    formats = exporters(config.export)
    source, parents = open_checkpoint(config.checkpoint, with_weights=not config.from_scratch)
    options, device = config.train, training_device()
    model = HfExporter().read(source, with_weights=not config.from_scratch)
    check_training_memory(f"checkpoint {source}", options, model.shape, model.kv_heads)
    length = window_length(options, model.shape.max_position_embeddings)
    if config.from_scratch:
        model = Decoder(model.shape, model.kv_heads)
        model.initialise(torch.Generator().manual_seed(options.seed))
    own = source / "tokenizer.json"
    tokenizer = config.tokenizer or (str(own) if own.is_file() else None)
    data = prepare_tokens(build(config.data), tokenizer, model.shape.vocab_size, Path(config.runs_dir) / "cache")
    windows = validation_windows(data.validation, options.validation_windows, length).to(device)
    for exporter, _ in formats:
        if exporter.of_served:
            raise UserError(
                "export has a format without weights, and nas finetune trains weights; use export=hf, gguf, uniform or "
                "modelopt, and nas export for the others"
            )
        exporter.check(model.shape, data.tokenizer)
    origins = weight_files(source) or [source / CONFIG]
    hashes = [file_hash(file) for file in origins]
    digest = hashes[0] if len(hashes) == 1 else value_hash(hashes, 64)
    resolved = {
        "checkpoint": {"name": source.name, "hash": digest},
        "from_scratch": config.from_scratch,
        "data": {**config.data, "digest": data.digest},
        "train": dataclasses.asdict(options),
        "export": config.export,
    }

    def validate() -> dict[str, float]:
        with autocast(options.precision, device):
            return {"validation_loss_nats": mean_loss(model, windows)}

    with start_run(path, "finetune", resolved, {"train": options.seed}, parents) as run:
        start = "fresh weights" if config.from_scratch else "inherited weights"
        console.print(f"Training {format_vector(model.kv_heads)} from {start} for {options.steps} steps in {path}")
        model.to(device)
        before = validate()["validation_loss_nats"]
        after = fit(model, text_loss(data.train, options, length), options, run, validate)["validation_loss_nats"]
        state = full_state_dict(model)
        if IS_MAIN:
            trained = Decoder(model.shape, model.kv_heads)
            trained.load_state_dict(state)
            card = {
                "KV groups by layer": format_vector(model.kv_heads),
                "validation loss before": f"{before:.5f} nats/token, with {start} (measured)",
                "validation loss after": f"{after:.5f} nats/token, after {options.steps} more steps (measured)",
                "trained from": f"{source.name} ({origins[0].name} {digest[:12]})",
            }
            # its special tokens lie beside the tokenizer that was given
            given = tokenizer_file(tokenizer) if tokenizer else data.tokenizer
            for exporter, below in formats:
                exporter.write(trained, given, path / below / "model", card)
        run.finish(scaffold=path / CHECKPOINT)
    console.print(f"Validation loss {before:.4f} before, {after:.4f} after; exported {path / formats[0][1] / 'model'}")
