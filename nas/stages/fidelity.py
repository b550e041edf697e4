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
from nas.quality import LossMemo, mean_loss
from nas.ranking import MEASUREMENTS, agreement, choose_some, choose_vectors
from nas.report.agreement import agreement_table, draw_fidelity
from nas.report.figure import figure
from nas.run import FinishedRun, Run, start_run
from nas.space import Vector, format_vector
from nas.stages.train import inherited_loss, weights_identity
from nas.training.loop import CHECKPOINT, fit
from nas.training.recipes import text_loss


def run(config: Fidelity, path: Path) -> None:
    """Compares into ``path``."""
    if config.vectors < 2 or config.alone.vectors == 1 or config.alone.vectors > config.vectors:
        raise UserError(
            f"vectors is {config.vectors} and alone.vectors {config.alone.vectors}; a ranking takes two or more, and "
            "those trained alone are among the others"
        )
    if config.equal_total >= config.vectors:
        raise UserError(f"equal_total is {config.equal_total} of {config.vectors} vectors; lower it or raise vectors")
    comparison = Comparison(config)
    source, inherited, data = comparison.source, comparison.inherited, comparison.data
    space = inherited.supernet.space
    spread, equal = choose_vectors(space, config.vectors, config.equal_total, config.seed)
    vectors, some = [*spread, *equal], choose_some(spread, equal, config.alone.vectors)
    further, alone = comparison.further(), comparison.alone()
    trainings = [(further, vector, config.further.seed) for vector in vectors]
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
        rows += comparison.train(trainings, path / "trainings")
        measurements = pd.DataFrame(rows, columns=["vector", "kind", "seed", "steps", "loss_nats"])
        measurements["total"] = measurements["vector"].map(sum)
        measurements["equal_total"] = measurements["vector"].isin(equal)
        measurements["vector"] = measurements["vector"].map(format_vector)
        table = agreement(measurements)
        write_csv(path / "measurements.csv", measurements[MEASUREMENTS])
        write_csv(path / "agreement.csv", table)
        title, width = f"{space.name}, {source.config['train']['sharing']}", 4.2 * (1 + table["truth"].nunique())
        with figure(path / "fidelity", title, width=width) as drawing:
            draw_fidelity(drawing, measurements, table)
        console.print(agreement_table(table))
        run.finish()


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Trainings that are alike but for the vector and the seed, by which ``start`` gives the model to be trained.

    The losses that they end with are remembered by all else that decides them, so that runs share them.
    """

    name: str
    start: Callable[[Vector, int], Decoder]
    options: TrainConfig
    losses: LossMemo


Trained = tuple[Series, Vector, int]  # with its seed


class Comparison:
    """A supernet's inherited losses, and the trainings that they are compared with."""

    def __init__(self, config: Fidelity) -> None:
        self._config, self._cache = config, Path(config.runs_dir) / "cache"
        self.source = FinishedRun(Path(config.supernet), "train")
        trained = self.source.config
        # The user names the text again: no run's config is ever executed.
        self.data: TokenData = prepare_tokens(
            build(config.data), trained["tokenizer"], trained["space"]["vocab_size"], self._cache
        )
        if self.data.digest != trained["data"]["digest"]:
            raise UserError(f"supernet {self.source.path} was trained on another text; give the same data=")
        self.inherited = inherited_loss(self.source, self.data, config.validation_windows, Path(config.runs_dir))
        of_plain_models = {field.name for field in dataclasses.fields(TrainConfig)}
        options = {name: value for name, value in trained["train"].items() if name in of_plain_models}
        self._options = TrainConfig(**options | {"checkpoint_every": config.checkpoint_every})

    def further(self) -> Series:
        """Extracted sub-networks, trained further."""
        given, options, extract = self._config.further, self._options, self.inherited.supernet.extract
        rate, steps = given.learning_rate or options.peak_learning_rate / 4, given.steps or math.ceil(options.steps / 4)
        options = dataclasses.replace(options, learning_rate=rate, steps=steps)
        return self._series("further", lambda vector, _: extract(vector), options, self.source.digest())

    def alone(self) -> Series:
        """Models that no supernet touched; those of one seed start from the same weights, as far as they share them."""
        given, space, recorded = self._config.alone, self.inherited.supernet.space, self.source.config.get("init")
        init = read_checkpoint(Path(self._config.init)) if recorded and given.vectors and self._config.init else None
        if recorded and given.vectors and (init is None or init.identity["hash"] != recorded["hash"]):
            raise UserError(
                f"supernet {self.source.path} started from the checkpoint {recorded['name']}, and so do the models "
                "trained alone; give the same init=, or alone.vectors=0"
            )

        def start(vector: Vector, seed: int) -> Decoder:
            supernet = Supernet(space, INIT_SHARING if init else DEFAULT_SHARING)
            if init:
                init.load_into(supernet)
            else:
                supernet.initialise(torch.Generator().manual_seed(seed))
            return supernet.extract(vector)

        options = dataclasses.replace(self._options, steps=given.steps or self._options.steps)
        return self._series("alone", start, options, [space.to_dict(), recorded])

    def _series(
        self, name: str, start: Callable[[Vector, int], Decoder], options: TrainConfig, weights: object
    ) -> Series:
        """``weights`` identifies what the models start from."""
        options = dataclasses.replace(options, validate_every=options.steps)
        decisive = weights_identity(dataclasses.asdict(options))
        del decisive["seed"]  # each training has its own
        identity = value_hash([weights, decisive, self.data.digest, list(self.inherited.windows.shape)])
        return Series(name, start, options, LossMemo(self._cache / f"{name}-{identity}.jsonl"))

    def train(self, trainings: list[Trained], folder: Path) -> list[tuple[Any, ...]]:
        """The rows of all trainings, which other processes that need the same ones may make, too."""
        rows: dict[Trained, tuple[Any, ...]] = {}
        with console.progress_bar("All trainings", sum(series.options.steps for series, _, _ in trainings)) as bar:
            while missing := [training for training in trainings if training not in rows]:
                before = len(rows)
                for series, vector, seed in missing:
                    bar(sum(done.options.steps for done, _, _ in rows), f"{series.name} {format_vector(vector)}")
                    if (loss := self._loss(series, vector, seed, folder)) is not None:
                        rows[series, vector, seed] = (vector, series.name, seed, series.options.steps, loss)
                if len(rows) == before:
                    time.sleep(1)  # others are making all that is left
        return [rows[training] for training in trainings]

    def _loss(self, series: Series, vector: Vector, seed: int, folder: Path) -> float | None:
        """Validation loss (nats per token) at the end of a training; None while another process makes it.

        A training goes on where a kill stopped it. It keeps its metrics, and while it is under way its checkpoint, in
        an own folder of ``folder``. Its windows are as long as those of the validation.
        """
        name, memo, windows = f"{format_vector(vector)} seed {seed}", series.losses, self.inherited.windows
        try:
            with filelock.FileLock(memo.file.with_name(f".{memo.file.stem}-{name}.lock"), blocking=False):
                if name not in memo.reload():
                    run = Run(folder / f"{series.name}-{format_vector(vector)}-{seed}")
                    run.path.mkdir(parents=True, exist_ok=True)
                    model, options = series.start(vector, seed), dataclasses.replace(series.options, seed=seed)
                    step_loss = text_loss(self.data.train, options, windows.shape[1] - 1)
                    validated = fit(model, step_loss, options, run, lambda: {"loss": mean_loss(model, windows)})
                    (run.path / CHECKPOINT).unlink(missing_ok=True)
                    memo.add({name: validated["loss"]})
        except filelock.Timeout:
            return None
        return memo[name]
