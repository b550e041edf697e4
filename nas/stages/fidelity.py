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

import filelock
import pandas as pd
import torch

from nas import console
from nas.config import Fidelity, TrainConfig, build
from nas.data import TokenData, prepare_tokens
from nas.errors import UserError
from nas.files import value_hash, write_atomically
from nas.model import Decoder, Supernet
from nas.model.pretrained import read_checkpoint
from nas.model.sharing import DEFAULT_SHARING, INIT_SHARING
from nas.quality import InheritedLoss, LossMemo, mean_loss
from nas.ranking import MEASUREMENTS, agreement, choose_some, choose_vectors
from nas.report.agreement import agreement_table, draw_fidelity
from nas.report.figure import figure
from nas.run import FinishedRun, Run, start_run
from nas.space import Vector, format_vector
from nas.stages.train import inherited_loss, weights_identity
from nas.training import fit, text_loss
from nas.training.loop import CHECKPOINT


class Series:
    """Trainings that are alike but for the vector and the seed, and the losses that they end with.

    The losses are remembered by all else that decides them, so that runs share them. ``start`` gives the model to train
    by vector and seed; ``weights`` identifies what it starts from.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[Vector, int], Decoder],
        weights: object,
        options: TrainConfig,
        config: Fidelity,
        inherited: InheritedLoss,
        data: TokenData,
    ) -> None:
        self.name, self.start = name, start
        self.options = dataclasses.replace(options, validate_every=options.steps)  # each training has its own seed
        self.tokens, self.windows = data.train, inherited.windows  # training windows are as long as those (N, T + 1)
        train = weights_identity(dataclasses.asdict(self.options))
        del train["seed"]
        identity = value_hash([weights, train, data.digest, list(self.windows.shape)])
        self.memo = LossMemo(Path(config.runs_dir) / "cache" / f"{name}-{identity}.jsonl")

    def loss_of(self, vector: Vector, seed: int, folder: Path) -> float | None:
        """Validation loss (nats per token) at the end of a training, which is made now unless it was made before.

        A training goes on where a kill stopped it. Processes that share the memo share the work: None while another one
        makes it. Each training keeps its metrics in ``folder``, and its checkpoint while it is under way.
        """
        name = f"{format_vector(vector)} seed {seed}"
        lock = filelock.FileLock(self.memo.file.with_name(f".{self.memo.file.stem}-{name}.lock"), blocking=False)
        try:
            with lock:
                if name not in self.memo.reload():
                    self.memo.add({name: self._train(vector, seed, folder)})
        except filelock.Timeout:
            return None
        return self.memo[name]

    def _train(self, vector: Vector, seed: int, folder: Path) -> float:
        run = Run(folder / f"{self.name}-{format_vector(vector)}-{seed}")
        run.path.mkdir(parents=True, exist_ok=True)
        options, model = dataclasses.replace(self.options, seed=seed), self.start(vector, seed)
        training_loss = text_loss(self.tokens, options, self.windows.shape[1] - 1)
        validated = fit(model, training_loss, options, run, lambda: {"loss": mean_loss(model, self.windows)})
        (run.path / CHECKPOINT).unlink(missing_ok=True)
        return validated["loss"]


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
    rows: dict[Training, tuple[Any, ...]] = {}
    with console.progress_bar("All trainings", sum(series.options.steps for series, _, _ in trainings)) as bar:
        while missing := [training for training in trainings if training not in rows]:
            before = len(rows)
            for series, vector, seed in missing:
                bar.update(sum(done.options.steps for done, _, _ in rows), f"{series.name} {format_vector(vector)}")
                if (loss := series.loss_of(vector, seed, folder)) is not None:
                    rows[series, vector, seed] = (vector, series.name, seed, series.options.steps, loss)
            if len(rows) == before:
                time.sleep(1)  # others are making all that is left
    return [rows[training] for training in trainings]


def _further(config: Fidelity, source: FinishedRun, inherited: InheritedLoss, data: TokenData) -> Series:
    """Extracted sub-networks, trained further."""
    options = _options(config, source)
    options.learning_rate = config.further.learning_rate or options.peak_learning_rate / 4
    options.steps = config.further.steps or math.ceil(options.steps / 4)
    extract = inherited.supernet.extract
    return Series("further", lambda vector, _: extract(vector), source.digest(), options, config, inherited, data)


def _alone(config: Fidelity, source: FinishedRun, inherited: InheritedLoss, data: TokenData) -> Series:
    """Models that no supernet touched; those of one seed start from the same weights, as far as they have the same."""
    space, options = inherited.supernet.space, _options(config, source)
    options.steps = config.alone.steps or options.steps
    recorded, init = source.config.get("init"), None
    if recorded and config.alone.vectors:
        init = read_checkpoint(Path(config.init)) if config.init else None
        if init is None or init.identity["hash"] != recorded["hash"]:
            raise UserError(
                f"supernet {source.path} started from the checkpoint {recorded['name']}, and so do the models trained "
                "alone; give the same init=, or alone.vectors=0"
            )

    def start(vector: Vector, seed: int) -> Decoder:
        supernet = Supernet(space, INIT_SHARING if init else DEFAULT_SHARING)
        if init:
            init.load_into(supernet)
        else:
            supernet.initialise(torch.Generator().manual_seed(seed))
        return supernet.extract(vector)

    return Series("alone", start, [space.to_dict(), recorded], options, config, inherited, data)


def _options(config: Fidelity, source: FinishedRun) -> TrainConfig:
    """How the supernet was trained, as far as it concerns a plain model."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    recorded = {name: value for name, value in source.config["train"].items() if name in names}
    return TrainConfig(**recorded | {"checkpoint_every": config.checkpoint_every})
