"""How fast a search finds its front: hypervolume after each evaluation, of one run or of the groups of a sweep."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nas.report.figure import COLOURS
from nas.search.pareto import Objectives, hypervolume_curve


def curves(
    runs: Iterable[tuple[str, pd.DataFrame]], objectives: Objectives, reference: npt.NDArray[np.float64]
) -> pd.DataFrame:
    """Hypervolume by evaluation and group over its runs: ``label, evaluations, median, low, high, runs``.

    ``runs`` gives the group's label (its sampler, say) and trials of each run; ``low`` and ``high`` are the smallest
    and largest of the group's runs that got that far.
    """
    lines = ((label, hypervolume_curve(trials, objectives, reference)) for label, trials in runs)
    volumes = pd.concat(pd.DataFrame({"label": label, "volume": line}) for label, line in lines)
    groups = volumes.assign(evaluations=volumes.index + 1).groupby(["label", "evaluations"], sort=False)["volume"]
    return groups.agg(median="median", low="min", high="max", runs="size").reset_index()


def draw_hypervolume(
    drawing: Figure, table: pd.DataFrame, objectives: Objectives, reference: npt.NDArray[np.float64]
) -> None:
    """Median line of each group with the band of its runs."""
    axes = drawing.subplots()
    for colour, (label, rows) in zip(COLOURS * 9, table.groupby("label", sort=False), strict=False):
        runs = int(rows["runs"].max())
        shown, at = f"{label} ({runs} run{'s'[: runs > 1]})", rows["evaluations"]
        axes.step(at, rows["median"], where="post", color=colour, label=shown)
        axes.fill_between(at, rows["low"], rows["high"], step="post", color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="evaluated vectors", ylabel="hypervolume")
    axes.set_title(f"reference point: {reference_text(objectives, reference)}", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", fontsize=8)


def reference_text(objectives: Objectives, reference: npt.NDArray[np.float64]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives.names, reference, strict=True))
