"""Earlier searches whose vectors enter a new one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.config import Search
from nas.csv_files import read_csv
from nas.errors import UserError
from nas.quality import InheritedLoss
from nas.run import FinishedRun
from nas.search import COLUMNS
from nas.space import SearchSpace, Vector, format_vector


@dataclass(frozen=True)
class WarmStart:
    """What earlier searches leave to a new one.

    Attributes:
        runs: The earlier searches.
        known: Losses of vectors (nats per token) that hold for the new search too.
        proposed: Vectors that are worth evaluating early.
    """

    runs: Sequence[FinishedRun]
    known: dict[Vector, float]
    proposed: list[Vector]

    def describe(self) -> str:
        """What is taken over, in a sentence."""
        names = ", ".join(str(run.path) for run in self.runs)
        return f"From {names}: {len(self.known)} losses taken over, {len(self.proposed)} vectors to be evaluated early"

    def enter(self, loss: InheritedLoss) -> None:
        """Lets the new search's losses know the old ones."""
        known = {format_vector(vector): value for vector, value in self.known.items()}
        loss.memo.add({name: value for name, value in known.items() if name not in loss.memo})


def earlier_searches(config: Search, space: SearchSpace) -> list[FinishedRun]:
    """The searches that ``warm_start`` names.

    Raises:
        UserError: One is not a finished search, or searched other choices than those of ``space``.
    """
    given = config.warm_start or []
    runs = [FinishedRun(Path(str(path)), "search") for path in (given if isinstance(given, list) else [given])]
    for run in runs:
        if run.config["space"]["kv_groups"] != space.to_dict()["kv_groups"]:
            raise UserError(f"warm_start {run.path} searched other kv_groups than those of {space.name}; leave it out")
    return runs


def warm_start(
    runs: Sequence[FinishedRun], space: SearchSpace, supernet: FinishedRun, windows: Sequence[int]
) -> WarmStart:
    """What the searches ``runs`` leave to a search of ``space``.

    A loss holds where supernet and validation windows are the same. Of other searches the front is worth proposing.

    Args:
        runs: The earlier searches.
        space: The new search's space.
        supernet: The new search's supernet.
        windows: Shape of its validation windows.

    Raises:
        UserError: A search's files are missing or changed.
    """
    known: dict[Vector, float] = {}
    proposed: list[Vector] = []
    for run in runs:
        same_supernet = run.info["parents"].get("supernet", {}).get("hash") == supernet.digest()
        holds = same_supernet and run.config.get("windows") == list(windows)
        table = read_csv(run.artifact("trials.csv" if holds else "front.csv"), COLUMNS)
        losses = dict(zip(map(space.parse, table["vector"]), table["loss_nats"].astype(float), strict=True))
        if holds:
            known = losses | known
        else:
            proposed += losses
    return WarmStart(runs, known, proposed)
