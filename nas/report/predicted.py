"""Predicted against measured end-to-end latencies, from check.csv."""

import pandas as pd
from matplotlib.figure import Figure

from nas.latency.accuracy import WORKLOAD, summarise_check
from nas.report.figure import COLOURS

_COLUMNS = 3
_BEYOND = 1.01  # so far the line goes on: with few models, or much the same times, small errors look small


def draw_check(drawing: Figure, check: pd.DataFrame) -> None:
    """One panel per workload, with the line of perfect prediction."""
    summaries = summarise_check(check)
    rows, columns = -(-len(summaries) // _COLUMNS), min(len(summaries), _COLUMNS)
    drawing.set_size_inches(max(4.2, 3.4 * columns), 0.6 + 3.1 * rows)
    panels = drawing.subplots(rows, columns, squeeze=False).flatten()
    for axes, summary in zip(panels, summaries, strict=False):
        models = check[(check[WORKLOAD] == [summary[key] for key in WORKLOAD]).all(axis=1)]
        times = models[["predicted_ms", "measured_ms"]].to_numpy()
        ends = [times.min() / _BEYOND, times.max() * _BEYOND]
        axes.plot(ends, ends, color="black", linewidth=0.8, label="perfect")
        colour = COLOURS[0] if summary["phase"] == "decode" else COLOURS[1]
        label = f"{len(models)} model{'s' * (len(models) > 1)}"
        axes.scatter(models["measured_ms"], models["predicted_ms"], s=16, color=colour, label=label)
        axes.set(xlabel="measured (ms)", ylabel="predicted (ms)")
        tau = f", τ {summary['kendall_tau']:.3f}" if "kendall_tau" in summary else ""
        axes.set_title(
            f"{summary['phase']}, batch {summary['batch']}, {summary['length']} tokens\n"
            f"mean error {summary['mape']:.2%}, worst {summary['worst']:.2%}{tau}",
            fontsize=8,
        )
        axes.legend(fontsize=7)
    for axes in panels[len(summaries) :]:
        axes.set_visible(False)
