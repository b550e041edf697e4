"""nas fidelity: how well a supernet's inherited losses rank vectors, tested by training some of them.

measurements.csv   every loss: inherited, after further training, and of models trained alone
agreement.csv      Kendall's τ of the inherited loss, and of the trivial predictor, with both trained losses
fidelity.png/.svg  both drawn
trainings/         metrics of every training
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch

from nas import console
from nas.config import Fidelity, TrainConfig, build
from nas.data import TokenData, prepare_tokens
from nas.errors import UserError
from nas.files import value_hash, write_csv
from nas.model import Decoder, Supernet
from nas.model.pretrained import read_checkpoint
from nas.model.sharing import DEFAULT_SHARING, INIT_SHARING
from nas.quality import InheritedLoss, LossMemo, mean_loss
from nas.ranking import MEASUREMENTS, agreement, choose_some, choose_vectors
from nas.report.agreement import agreement_table, draw_fidelity
from nas.report.figure import figure
from nas.run import FinishedRun, Run, origin, start_run
from nas.space import Vector, format_vector
from nas.stages.train import inherited_loss, load_checkpoint, weights_identity
from nas.training.loop import CHECKPOINT, autocast, fit
from nas.training.recipes import text_loss


def run(config: Fidelity, path: Path) -> None:
    """Compares into ``path``."""
    count, seeds = config.alone.vectors, config.alone.seeds
    if config.vectors < 2:
        raise UserError(f"vectors is {config.vectors}, and a ranking takes two or more; raise it")
    if count == 1 or count > config.vectors:
        raise UserError(
            f"alone.vectors is {count} of {config.vectors} vectors; give 2 to {config.vectors}, or 0 for none"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"alone.seeds is {seeds}; give one or more seeds, each of them once")
    if config.equal_total >= config.vectors:
        raise UserError(f"equal_total is {config.equal_total} of {config.vectors} vectors; lower it or raise vectors")
    source, runs = FinishedRun(Path(config.supernet), "train"), Path(config.runs_dir)
    trained = source.config
    # The user names the text again: no run's config is ever executed.
    data = prepare_tokens(build(config.data), trained["tokenizer"], trained["space"]["vocab_size"], runs / "cache")
    if data.digest != trained["data"]["digest"]:
        raise UserError(f"supernet {source.path} was trained on another text; give the same data=")
    inherited = inherited_loss(source, data, config.validation_windows, runs)
    space = inherited.supernet.space
    spread, equal = choose_vectors(space, config.vectors, config.equal_total, config.seed)
    vectors, some = [*spread, *equal], choose_some(spread, equal, config.alone.vectors)
    further, alone = further_and_alone(config, source, data, inherited)
    trainings = [(further, vector, config.further.seed) for vector in vectors]
    trainings += [(alone, vector, seed) for seed in config.alone.seeds for vector in some]
    resolved = dataclasses.asdict(config) | {
        "supernet": source.path.name,
        "data": {**config.data, "digest": data.digest},
        "trainings": {series.name: dataclasses.asdict(series.options) for series in (further, alone)},
    }
    del resolved["name"], resolved["runs_dir"], resolved["logger"]
    with start_run(path, "fidelity", resolved, {"vectors": config.seed}, {"supernet": source}) as run:
        console.print(f"Ranking {config.vectors} vectors of {source.path} by {len(trainings)} trainings in {path}")
        losses = zip(vectors, inherited.of(vectors), strict=True)
        rows: list[tuple[Any, ...]] = [(vector, "inherited", None, None, loss) for vector, loss in losses]
        rows += train(trainings, path / "trainings")
        measurements = pd.DataFrame(rows, columns=["vector", "kind", "seed", "steps", "loss_nats"])
        measurements["total"] = measurements["vector"].map(sum)
        measurements["equal_total"] = measurements["vector"].isin(equal)
        measurements["vector"] = measurements["vector"].map(format_vector)
        table = agreement(measurements)
        write_csv(path / "measurements.csv", measurements[MEASUREMENTS].assign(**origin()))
        write_csv(path / "agreement.csv", table.assign(**origin()))
        title, width = f"{space.name}, {trained['train']['sharing']}", 4.2 * (1 + table["truth"].nunique())
        with figure(path / "fidelity", title, width=width) as drawing:
            draw_fidelity(drawing, measurements, table)
        console.print(agreement_table(table))
        run.finish()


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Trainings that are alike but for the vector and the seed, by which ``start`` gives the model to be trained."""

    name: str
    start: Callable[[Vector, int], Decoder]
    options: TrainConfig
    data: TokenData
    windows: torch.Tensor  # of validation; those of the training are as long
    losses: LossMemo  # named by all else that decides them, so that runs share them

    def loss(self, vector: Vector, seed: int, folder: Path) -> float:
        """Validation loss (nats per token) at the end of a training; filelock.Timeout while another process makes it.

        A training goes on where a kill stopped it. It keeps its metrics, and while it is under way its checkpoint, in
        an own folder of ``folder``.
        """
        name, memo = f"{format_vector(vector)} seed {seed}", self.losses
        with filelock.FileLock(memo.file.with_name(f".{memo.file.stem}-{name}.lock"), blocking=False):
            if name not in memo.reload():
                run = Run(folder / f"{self.name}-{format_vector(vector)}-{seed}")
                run.path.mkdir(parents=True, exist_ok=True)
                model, options = self.start(vector, seed), dataclasses.replace(self.options, seed=seed)
                step_loss = text_loss(self.data.train, options, self.windows.shape[1] - 1)

                def validate() -> dict[str, float]:
                    with autocast(options.precision, self.windows.device):
                        return {"loss": mean_loss(model, self.windows)}

                validated = fit(model, step_loss, options, run, validate)
                (run.path / CHECKPOINT).unlink(missing_ok=True)
                memo.add({name: validated["loss"]})
        return memo[name]


def further_and_alone(
    config: Fidelity, source: FinishedRun, data: TokenData, inherited: InheritedLoss
) -> tuple[Series, Series]:
    """Extracted sub-networks, and models that no supernet touched: of one seed they start alike, as far as they can."""
    space, extract, recorded = inherited.supernet.space, inherited.supernet.extract, source.config.get("init")
    init = read_checkpoint(Path(config.init)) if recorded and config.alone.vectors and config.init else None
    if recorded and config.alone.vectors and (init is None or init.identity["hash"] != recorded["hash"]):
        raise UserError(
            f"supernet {source.path} started from the checkpoint {recorded['name']}, and so do the models "
            "trained alone; give the same init=, or alone.vectors=0"
        )

    def start_alone(vector: Vector, seed: int) -> Decoder:
        supernet = Supernet(space, INIT_SHARING if init else DEFAULT_SHARING)
        if init:
            load_checkpoint(init, supernet, source.config, data, Path(config.runs_dir) / "cache")
        else:
            supernet.initialise(torch.Generator().manual_seed(seed))
        return supernet.extract(vector)

    def series(name: str, start: Callable[[Vector, int], Decoder], options: TrainConfig, weights: object) -> Series:
        """``weights`` identifies what the models start from."""
        options = dataclasses.replace(options, validate_every=options.steps, checkpoint_every=config.checkpoint_every)
        decisive = weights_identity(dataclasses.asdict(options))
        del decisive["seed"]  # each training has its own
        identity = value_hash([weights, decisive, data.digest, list(inherited.windows.shape)])
        memo = LossMemo(Path(config.runs_dir) / "cache" / f"{name}-{identity}.jsonl")
        return Series(name, start, options, data, inherited.windows, memo)

    of_plain_models = {field.name for field in dataclasses.fields(TrainConfig)}
    own = TrainConfig(**{name: value for name, value in source.config["train"].items() if name in of_plain_models})
    rate = config.further.learning_rate or own.peak_learning_rate / 4
    more = dataclasses.replace(own, learning_rate=rate, steps=config.further.steps or math.ceil(own.steps / 4))
    further = series("further", lambda vector, _: extract(vector), more, source.digest())
    own = dataclasses.replace(own, steps=config.alone.steps or own.steps)
    return further, series("alone", start_alone, own, [space.to_dict(), recorded])


def train(trainings: list[tuple[Series, Vector, int]], folder: Path) -> list[tuple[Any, ...]]:
    """The rows of all trainings, which other processes that need the same ones may make, too."""
    losses: dict[tuple[Series, Vector, int], float] = {}
    with console.progress_bar("All trainings", sum(series.options.steps for series, _, _ in trainings)) as bar:
        while missing := [training for training in trainings if training not in losses]:
            before = len(losses)
            for series, vector, seed in missing:
                bar(sum(done.options.steps for done, _, _ in losses), f"{series.name} {format_vector(vector)}")
                with contextlib.suppress(filelock.Timeout):
                    losses[series, vector, seed] = series.loss(vector, seed, folder)
            if len(losses) == before:
                time.sleep(1)  # others are making all that is left
    return [(vector, one.name, seed, one.options.steps, losses[one, vector, seed]) for one, vector, seed in trainings]
