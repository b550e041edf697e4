"""Trackers of others: what a run writes goes to TensorBoard, W&B, Trackio or MLflow too, if ``logger=`` names one.

All of it comes from what `nas.run` sees anyway, the lines of metrics.jsonl and the files of a finished run, so nothing
that computes knows of trackers. None needs a network; each is an optional dependency.
"""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nas.errors import UserError

if TYPE_CHECKING:
    import pandas as pd  # the command line starts without it

_TABLES = ("front", "metrics")  # whose rows belong together; trials.csv is a sequence


class Tracker(ABC):
    """One run in a tracker. It is made from the run's name, such as ``search/NAME``, and config."""

    library: ClassVar[str]  # that it needs

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name; steps do not go back."""

    @abstractmethod
    def table(self, name: str, table: "pd.DataFrame") -> None: ...

    @abstractmethod
    def picture(self, file: Path) -> None:
        """A PNG."""

    @abstractmethod
    def close(self) -> None: ...

    def finish(self, folder: Path) -> None:
        """The evaluated vectors as steps, and the tables and figures, of a run directory that is complete."""
        import pandas as pd

        if (folder / "trials.csv").is_file():
            trials = pd.read_csv(folder / "trials.csv").select_dtypes(["number", "bool"]).astype(float)
            for step, (_, row) in enumerate(trials.add_prefix("evaluated/").iterrows(), start=1):
                self.scalars({str(name): float(value) for name, value in row.dropna().items()}, step)
        for name in _TABLES:
            if (file := folder / f"{name}.csv").is_file():
                self.table(name, pd.read_csv(file, dtype={"vector": str}))
        for file in sorted(folder.glob("*.png")):
            self.picture(file)


class TensorBoard(Tracker):
    library = "tensorboard"

    def __init__(self, run: str, config: Mapping[str, Any], folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(folder) / run))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, table: "pd.DataFrame") -> None:
        head = list(map(str, table.columns))
        lines: list[list[str]] = [head, ["---"] * len(head), *table.astype(str).to_numpy().tolist()]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines))

    def picture(self, file: Path) -> None:
        import matplotlib.image

        self._writer.add_image(file.stem, matplotlib.image.imread(file)[..., :3], dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    library = "wandb"

    def __init__(self, run: str, config: Mapping[str, Any], project: str, folder: str, mode: str) -> None:
        import wandb

        self._library = wandb
        identity = run.replace("/", "-")  # the same name goes on with the same run
        settings = wandb.Settings(silent=True)
        of_run: dict[str, Any] = {"name": run, "id": identity, "resume": "allow", "config": dict(config)}
        self._run = wandb.init(project=project, dir=folder, mode=mode, settings=settings, **of_run)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def table(self, name: str, table: "pd.DataFrame") -> None:
        self._run.log({name: self._library.Table(dataframe=table)})

    def picture(self, file: Path) -> None:
        self._run.log({file.stem: self._library.Image(str(file))})

    def close(self) -> None:
        self._run.finish()


class Trackio(WeightsAndBiases):
    """Hugging Face's tracker, which has the same interface."""

    library = "trackio"

    def __init__(self, run: str, config: Mapping[str, Any], project: str, folder: str) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(Path(folder).resolve()))  # read as it is imported
        import trackio

        self._library = trackio
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        with redirect_stdout(None):
            self._run = trackio.init(project, name=run, config=dict(config), resume="allow", **quiet)

    def table(self, name: str, table: "pd.DataFrame") -> None:
        super().table(f"table/{name}", table)  # a name such as metrics is taken

    def close(self) -> None:
        with redirect_stdout(None):
            self._library.finish()


class MLflow(Tracker):
    library = "mlflow"

    def __init__(self, run: str, config: Mapping[str, Any], project: str, uri: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(project)
        mlflow.start_run(run_name=run)
        mlflow.log_dict(dict(config), "config.json")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def table(self, name: str, table: "pd.DataFrame") -> None:
        self._mlflow.log_table(table, f"{name}.json")

    def picture(self, file: Path) -> None:
        self._mlflow.log_artifact(str(file))

    def close(self) -> None:
        self._mlflow.end_run()


_make: Callable[..., Tracker] | None = None  # of the command that runs, for each run that it writes


def choose(make: partial[Tracker] | None) -> None:
    """What this command's runs are tracked by, as ``logger=`` says; a UserError if its library is missing."""
    global _make
    library = make.func.library if make else None  # type: ignore[attr-defined]
    if library and not importlib.util.find_spec(library):
        raise UserError(f"logger={library} needs {library}, which is not installed; pip install {library}")
    _make = make


@contextmanager
def tracked(run: str, config: Mapping[str, Any]) -> Iterator[Tracker | None]:
    """The tracker of a run that begins or goes on, if one was chosen, until that ends or is interrupted."""
    tracker = _make(run=run, config=config) if _make else None
    try:
        yield tracker
    finally:
        if tracker:
            tracker.close()
