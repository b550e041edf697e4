"""A series of trainings that are alike but for the vector and the seed: what rankings of vectors are held against."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock
from torch import Tensor

from nas.config import TrainConfig
from nas.data.tokens import Tokens
from nas.model import Decoder
from nas.quality import LossMemo, mean_loss
from nas.run import Run
from nas.space import Vector, format_vector
from nas.training.loop import CHECKPOINT, fit
from nas.training.text import text_loss


@dataclass(frozen=True, eq=False)
class Series:
    """The trainings, and the losses that they end with."""

    name: str  # tells its trainings from those of another series
    start: Callable[[Vector, int], Decoder]  # the model to train, by vector and seed
    options: TrainConfig  # its seed is replaced by each training's own
    tokens: Tokens  # the training text
    windows: Tensor  # for validation (N, T + 1); training windows are as long
    memo: LossMemo  # of these very trainings

    def loss_of(self, vector: Vector, seed: int, folder: Path) -> float | None:
        """Validation loss (nats per token) at the end of a training, which is made now unless it was made before.

        A training goes on where a kill stopped it. Processes that share the memo share the work.

        Args:
            vector: The vector.
            seed: Of the batches, and of fresh weights.
            folder: Where each training keeps its metrics, and its checkpoint while it is under way.

        Returns:
            None while another process makes it.

        Raises:
            UserError: As `fit`.
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
        options = dataclasses.replace(self.options, seed=seed)
        model = self.start(vector, seed)
        training_loss = text_loss(self.tokens, options, self.windows.shape[1] - 1)
        validated = fit(model, training_loss, options, run, lambda: {"loss": mean_loss(model, self.windows)})
        (run.path / CHECKPOINT).unlink(missing_ok=True)
        return validated["loss"]
