"""How fast a search finds its front: hypervolume after each evaluation, of one run or of the groups of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nas.report.figure import COLOURS
from nas.search.pareto import Objectives, hypervolume_curve


@dataclass(frozen=True)
class SearchCurve:
    """The trials of one run, and the label of the group that it belongs to (its sampler, say)."""

    label: str
    trials: pd.DataFrame


def curves(runs: Sequence[SearchCurve], objectives: Objectives, reference: npt.NDArray[np.float64]) -> pd.DataFrame:
    """Hypervolume by evaluation and group over its runs: ``label, evaluations, median, low, high, runs``.

    ``low`` and ``high`` are the smallest and largest of the group's runs that got that far.
    """
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        lines = [hypervolume_curve(run.trials, objectives, reference) for run in runs if run.label == label]
        for count in range(max(map(len, lines))):
            values = [line[count] for line in lines if len(line) > count]
            rows.append((label, count + 1, float(np.median(values)), min(values), max(values), len(values)))
    return pd.DataFrame(rows, columns=["label", "evaluations", "median", "low", "high", "runs"])


def draw_hypervolume(
    drawing: Figure, table: pd.DataFrame, objectives: Objectives, reference: npt.NDArray[np.float64]
) -> None:
    """Median line of each group with the band of its runs."""
    axes = drawing.subplots()
    for colour, (label, rows) in zip(COLOURS * 9, table.groupby("label", sort=False), strict=False):
        runs = int(rows["runs"].max())
        axes.step(
            rows["evaluations"],
            rows["median"],
            where="post",
            color=colour,
            label=f"{label} ({runs} run{'s'[: runs > 1]})",
        )
        axes.fill_between(
            rows["evaluations"], rows["low"], rows["high"], step="post", color=colour, alpha=0.2, linewidth=0
        )
    at = ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives.names, reference, strict=True))
    axes.set(xlabel="evaluated vectors", ylabel="hypervolume")
    axes.set_title(f"reference point: {at}", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", fontsize=8)
