"""nas fidelity: how well a supernet's inherited losses rank vectors, found out by training some of them.

measurements.csv   every loss: inherited, after further training, and of models trained alone
agreement.csv      Kendall's τ of the inherited loss, and of the trivial predictor, with both
fidelity.png/.svg  both drawn
trainings/         metrics of every training
"""

import dataclasses
import math
import time
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
    further, alone = _further(config, source, inherited, data), _alone(config, source, inherited, data)
    trainings = [(further, vector, config.further.seed) for vector in [*spread, *equal]]
    trainings += [
        (alone, vector, seed)
        for seed in config.alone.seeds
        for vector in choose_some(spread, equal, config.alone.vectors)
    ]
    asked = dataclasses.asdict(config) | {
        "supernet": source.path.name,
        "data": {**config.data, "digest": data.digest},
        "trainings": {series.name: dataclasses.asdict(series.options) for series in (further, alone)},
    }
    del asked["name"], asked["runs_dir"]
    with start_run(path, "fidelity", asked, {"vectors": config.seed}, {"supernet": source}) as run:
        console.print(f"Ranking {config.vectors} vectors of {source.path} by {len(trainings)} trainings in {path}")
        rows = _inherited_rows(inherited, [*spread, *equal]) + _trained_rows(trainings, path / "trainings")
        measurements = pd.DataFrame(rows, columns=["vector", "kind", "seed", "steps", "loss_nats"])
        measurements["total"] = measurements["vector"].map(sum)
        measurements["equal_total"] = measurements["vector"].isin(equal)
        measurements["vector"] = measurements["vector"].map(format_vector)
        write_results(measurements[MEASUREMENTS], f"{space.name}, {source.config['train']['sharing']}", path)
        run.finish()


def write_results(measurements: pd.DataFrame, title: str, path: Path) -> None:
    """Writes the measurements, what they say, and the figure of both into ``path``."""
    table = agreement(measurements)
    for name, frame in (("measurements", measurements), ("agreement", table)):
        write_atomically(path / f"{name}.csv", partial(frame.to_csv, index=False))
    with figure(path / "fidelity", title, width=4.2 * (1 + table["truth"].nunique())) as drawing:
        draw_fidelity(drawing, measurements, table)
    console.print(agreement_table(table))


def _text_of(source: FinishedRun, config: Fidelity) -> TokenData:
    """The text that the supernet was trained on, which the user names again: no run's config is ever executed."""
    vocabulary, cache = source.config["space"]["vocab_size"], Path(config.runs_dir) / "cache"
    data = prepare_tokens(build(config.data), source.config["tokenizer"], vocabulary, cache)
    if data.digest != source.config["data"]["digest"]:
        raise UserError(f"supernet {source.path} was trained on another text; give the same data=")
    return data


def _inherited_rows(inherited: InheritedLoss, vectors: list[Vector]) -> list[tuple[Any, ...]]:
    return [
        (vector, "inherited", None, None, loss) for vector, loss in zip(vectors, inherited.of(vectors), strict=True)
    ]


def _trained_rows(trainings: list[Training], folder: Path) -> list[tuple[Any, ...]]:
    """Makes all trainings, together with any other process that is at the same ones."""
    losses: dict[Training, float] = {}
    with console.progress_bar("All trainings", sum(series.options.steps for series, _, _ in trainings)) as bar:
        while missing := [training for training in trainings if training not in losses]:
            before = len(losses)
            for series, vector, seed in missing:
                bar.update(sum(done.options.steps for done, _, _ in losses), f"{series.name} {format_vector(vector)}")
                if (loss := series.settle(vector, seed, folder)) is not None:
                    losses[series, vector, seed] = loss
            if len(losses) == before:
                time.sleep(1)  # others are at all that is left
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
    memo = _memo(config, "further", inherited, data, options, source.digest())
    return Series(
        "further",
        lambda vector, _: inherited.supernet.extract(vector),
        options,
        data.train,
        inherited.windows,
        memo,
    )


def _alone(config: Fidelity, source: FinishedRun, inherited: InheritedLoss, data: TokenData) -> Series:
    """Models that no supernet touched; those of one seed start from the same weights, as far as they have the same."""
    space, options = inherited.supernet.space, _options(config, source)
    steps = config.alone.steps or options.steps
    options = dataclasses.replace(options, steps=steps, validate_every=steps)
    init = _checkpoint(config, source)

    def start(vector: Vector, seed: int) -> Decoder:
        whole = Supernet(space, INIT_SHARING if init else DEFAULT_SHARING)
        if init:
            init.load_into(whole)
        else:
            whole.initialise(torch.Generator().manual_seed(seed))
        return whole.extract(vector)

    memo = _memo(config, "alone", inherited, data, options, [space.to_dict(), source.config.get("init")])
    return Series("alone", start, options, data.train, inherited.windows, memo)


def _checkpoint(config: Fidelity, source: FinishedRun) -> Checkpoint | None:
    """The checkpoint that the supernet started from, if it did and models are trained alone."""
    begun = source.config.get("init")
    if not begun or not config.alone.vectors:
        return None
    checkpoint = read_checkpoint(Path(config.init)) if config.init else None
    if checkpoint is None or checkpoint.identity["hash"] != begun["hash"]:
        raise UserError(
            f"supernet {source.path} started from the checkpoint {begun['name']}, and so do the models trained alone; "
            "give the same init=, or alone.vectors=0"
        )
    return checkpoint


def _options(config: Fidelity, source: FinishedRun) -> TrainConfig:
    """How the supernet was trained, as far as it concerns a plain model."""
    recorded = source.config["train"]
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name in recorded]
    return TrainConfig(**{name: recorded[name] for name in names} | {"checkpoint_every": config.checkpoint_every})


def _memo(
    config: Fidelity, name: str, inherited: InheritedLoss, data: TokenData, options: TrainConfig, start: object
) -> LossMemo:
    """Remembers the losses of a series by all that decides them but vector and seed, so that runs share them."""
    train = {key: value for key, value in weights_identity(dataclasses.asdict(options)).items() if key != "seed"}
    identity = value_hash([start, train, data.digest, list(inherited.windows.shape)])
    return LossMemo(Path(config.runs_dir) / "cache" / f"{name}-{identity}.jsonl")
