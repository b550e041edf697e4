"""Predicted against measured whole models, from latency_check.csv."""

import pandas as pd
from matplotlib.figure import Figure

from nas.report.figure import COLOURS


def check_errors(check: pd.DataFrame) -> pd.DataFrame:
    """The check with ``error``, the relative error of each prediction."""
    return check.assign(error=check["predicted_ms"] / check["measured_ms"] - 1)


def draw_check(drawing: Figure, check: pd.DataFrame, title: str) -> None:
    """One panel a phase, with the line of perfect prediction."""
    phases = list(check["phase"].unique())
    panels = drawing.subplots(1, len(phases), squeeze=False)[0]
    for axes, phase, colour in zip(panels, phases, COLOURS, strict=False):
        rows = check[check["phase"] == phase]
        ends = [
            rows[["predicted_ms", "measured_ms"]].to_numpy().min(),
            rows[["predicted_ms", "measured_ms"]].to_numpy().max(),
        ]
        axes.plot(ends, ends, color="black", linewidth=0.8, label="perfect")
        axes.scatter(rows["measured_ms"], rows["predicted_ms"], s=24, color=colour, label=f"{len(rows)} whole models")
        axes.set(xlabel="measured (ms)", ylabel="predicted (ms)")
        at = f"batch {rows['batch'].iloc[0]}, length {rows['length'].iloc[0]}"
        axes.set_title(
            f"{phase}, {at}\nmean error {rows['error'].abs().mean():.1%}, worst {rows['error'].abs().max():.1%}",
            fontsize=9,
        )
        axes.legend(fontsize=8)
    drawing.suptitle(title, fontsize=9)
