"""nas fidelity: how well a supernet's inherited losses rank vectors, tested by training some of them.

measurements.csv   every loss: inherited, after further training, and of models trained alone
agreement.csv      Kendall's τ of the inherited loss, and of the trivial predictor, with both
fidelity.png/.svg  both drawn
trainings/         metrics of every training
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nas import console
from nas.config import Fidelity, TrainConfig, build
from nas.data import TokenData, prepare_tokens
from nas.errors import UserError
from nas.files import value_hash, write_atomically
from nas.model import Decoder, Supernet
from nas.model.pretrained import Checkpoint, read_checkpoint
from nas.model.sharing import DEFAULT_SHARING, INIT_SHARING
from nas.quality import InheritedLoss, LossMemo
from nas.ranking import MEASUREMENTS, agreement, choose_some, choose_vectors
from nas.report.agreement import agreement_table, draw_fidelity
from nas.report.figure import figure
from nas.run import FinishedRun, start_run
from nas.space import Vector, format_vector
from nas.stages.train import inherited_loss, weights_identity
from nas.training.series import Series

Training = tuple[Series, Vector, int]  # with its seed


def run(config: Fidelity, path: Path) -> None:
    """Compares into ``path``."""
    if config.vectors < 2 or config.alone.vectors == 1 or config.alone.vectors > config.vectors:
        raise UserError(
            f"vectors is {config.vectors} and alone.vectors {config.alone.vectors}; a ranking takes two or more, and "
            "those trained alone are among the others"
        )
    if config.equal_total >= config.vectors:
        raise UserError(f"equal_total is {config.equal_total} of {config.vectors} vectors; lower it or raise vectors")
    source = FinishedRun(Path(config.supernet), "train")
    data = _text_of(source, config)
    inherited = inherited_loss(source, data, config.validation_windows, Path(config.runs_dir))
    space = inherited.supernet.space
    spread, equal = choose_vectors(space, config.vectors, config.equal_total, config.seed)
    vectors = [*spread, *equal]
    further, alone = _further(config, source, inherited, data), _alone(config, source, inherited, data)
    trainings = [(further, vector, config.further.seed) for vector in vectors]
    some = choose_some(spread, equal, config.alone.vectors)
    trainings += [(alone, vector, seed) for seed in config.alone.seeds for vector in some]
    resolved = dataclasses.asdict(config) | {
        "supernet": source.path.name,
        "data": {**config.data, "digest": data.digest},
        "trainings": {series.name: dataclasses.asdict(series.options) for series in (further, alone)},
    }
    del resolved["name"], resolved["runs_dir"]
    with start_run(path, "fidelity", resolved, {"vectors": config.seed}, {"supernet": source}) as run:
        console.print(f"Ranking {config.vectors} vectors of {source.path} by {len(trainings)} trainings in {path}")
        losses = zip(vectors, inherited.of(vectors), strict=True)
        rows: list[tuple[Any, ...]] = [(vector, "inherited", None, None, loss) for vector, loss in losses]
        rows += _trained_rows(trainings, path / "trainings")
        measurements = pd.DataFrame(rows, columns=["vector", "kind", "seed", "steps", "loss_nats"])
        measurements["total"] = measurements["vector"].map(sum)
        measurements["equal_total"] = measurements["vector"].isin(equal)
        measurements["vector"] = measurements["vector"].map(format_vector)
        table = agreement(measurements)
        for name, frame in (("measurements", measurements[MEASUREMENTS]), ("agreement", table)):
            write_atomically(path / f"{name}.csv", partial(frame.to_csv, index=False))
        title, width = f"{space.name}, {source.config['train']['sharing']}", 4.2 * (1 + table["truth"].nunique())
        with figure(path / "fidelity", title, width=width) as drawing:
            draw_fidelity(drawing, measurements, table)
        console.print(agreement_table(table))
        run.finish()


def _text_of(source: FinishedRun, config: Fidelity) -> TokenData:
    """The text that the supernet was trained on, which the user names again: no run's config is ever executed."""
    vocabulary, cache = source.config["space"]["vocab_size"], Path(config.runs_dir) / "cache"
    data = prepare_tokens(build(config.data), source.config["tokenizer"], vocabulary, cache)
    if data.digest != source.config["data"]["digest"]:
        raise UserError(f"supernet {source.path} was trained on another text; give the same data=")
    return data


def _trained_rows(trainings: list[Training], folder: Path) -> list[tuple[Any, ...]]:
    """Makes all trainings, together with any other process that makes the same ones."""
    losses: dict[Training, float] = {}
    with console.progress_bar("All trainings", sum(series.options.steps for series, _, _ in trainings)) as bar:
        while missing := [training for training in trainings if training not in losses]:
            before = len(losses)
            for series, vector, seed in missing:
                bar.update(sum(done.options.steps for done, _, _ in losses), f"{series.name} {format_vector(vector)}")
                if (loss := series.loss_of(vector, seed, folder)) is not None:
                    losses[series, vector, seed] = loss
            if len(losses) == before:
                time.sleep(1)  # others are making all that is left
    return [
        (vector, series.name, seed, series.options.steps, losses[series, vector, seed])
        for series, vector, seed in trainings
    ]


def _further(config: Fidelity, source: FinishedRun, inherited: InheritedLoss, data: TokenData) -> Series:
    """Extracted sub-networks, trained further."""
    options = _options(config, source)
    steps = config.further.steps or math.ceil(options.steps / 4)
    rate = config.further.learning_rate or options.peak_learning_rate / 4
    options = dataclasses.replace(options, steps=steps, validate_every=steps, learning_rate=rate)

    def start(vector: Vector, _: int) -> Decoder:
        return inherited.supernet.extract(vector)

    return _series("further", start, source.digest(), options, config, inherited, data)


def _alone(config: Fidelity, source: FinishedRun, inherited: InheritedLoss, data: TokenData) -> Series:
    """Models that no supernet touched; those of one seed start from the same weights, as far as they have the same."""
    space, options = inherited.supernet.space, _options(config, source)
    steps = config.alone.steps or options.steps
    options = dataclasses.replace(options, steps=steps, validate_every=steps)
    init = _checkpoint(config, source)

    def start(vector: Vector, seed: int) -> Decoder:
        supernet = Supernet(space, INIT_SHARING if init else DEFAULT_SHARING)
        if init:
            init.load_into(supernet)
        else:
            supernet.initialise(torch.Generator().manual_seed(seed))
        return supernet.extract(vector)

    return _series("alone", start, [space.to_dict(), source.config.get("init")], options, config, inherited, data)


def _checkpoint(config: Fidelity, source: FinishedRun) -> Checkpoint | None:
    """The checkpoint that the supernet started from, if it did and models are trained alone."""
    recorded = source.config.get("init")
    if not recorded or not config.alone.vectors:
        return None
    checkpoint = read_checkpoint(Path(config.init)) if config.init else None
    if checkpoint is None or checkpoint.identity["hash"] != recorded["hash"]:
        raise UserError(
            f"supernet {source.path} started from the checkpoint {recorded['name']}, and so do the models trained "
            "alone; give the same init=, or alone.vectors=0"
        )
    return checkpoint


def _options(config: Fidelity, source: FinishedRun) -> TrainConfig:
    """How the supernet was trained, as far as it concerns a plain model."""
    recorded = source.config["train"]
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name in recorded]
    return TrainConfig(**{name: recorded[name] for name in names} | {"checkpoint_every": config.checkpoint_every})


def _series(
    name: str,
    start: Callable[[Vector, int], Decoder],
    weights: object,
    options: TrainConfig,
    config: Fidelity,
    inherited: InheritedLoss,
    data: TokenData,
) -> Series:
    """Trainings, remembered by all that decides their losses but vector and seed, so that runs share them."""
    train = {key: value for key, value in weights_identity(dataclasses.asdict(options)).items() if key != "seed"}
    identity = value_hash([weights, train, data.digest, list(inherited.windows.shape)])
    memo = LossMemo(Path(config.runs_dir) / "cache" / f"{name}-{identity}.jsonl")
    return Series(name, start, options, data.train, inherited.windows, memo)
