"""How well predictions agree: inherited with trained losses, predicted with measured latencies of end-to-end models."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from rich.table import Table

from nas.latency.accuracy import WORKLOAD, summarise_check
from nas.ranking import PREDICTORS, TRUTHS
from nas.report.figure import COLOURS, GREY

NOTE = (
    "Models trained alone are the evidence that counts. Further training starts from the inherited weights, so its τ "
    "is partly the same number twice; corrected: beyond what changes dealt to the vectors at random give; p: the share "
    "of those that do as well. 1 seed: mean τ with single seeds' losses; ceiling: what the other seeds reach there."
)
_COLUMNS = 3  # of panels of the check
_BEYOND = 1.01  # so far the line goes on: with few models, or much the same times, small errors look small


def loss_pairs(measurements: pd.DataFrame, truth: str) -> pd.DataFrame:
    """One row per vector: ``inherited``, the ``mean`` trained loss over seeds, its ``spread``, ``equal_total``.

    The spread is the standard error of the mean over seeds once what a seed does to all vectors alike is taken out;
    0 for a single seed.
    """
    inherited = measurements[measurements["kind"] == "inherited"].set_index("vector")
    losses = measurements[measurements["kind"] == truth].pivot_table("loss_nats", "vector", "seed")
    paired = losses - losses.mean(axis=0)
    spread = (paired.std(axis=1) / np.sqrt(losses.shape[1])).fillna(0.0)
    pairs = inherited.loc[losses.index, ["loss_nats", "equal_total"]].rename(columns={"loss_nats": "inherited"})
    return pairs.assign(mean=losses.mean(axis=1), spread=spread)


def draw_fidelity(drawing: FigureBase, measurements: pd.DataFrame, table: pd.DataFrame) -> None:
    """A panel of losses for each kind of trained loss, and one of the agreements."""
    truths = list(table["truth"].unique())
    panels = drawing.subplots(1, len(truths) + 1, squeeze=False)[0]
    for axes, truth in zip(panels, truths, strict=False):
        _draw_losses(axes, loss_pairs(measurements, truth), truth, table)
    _draw_agreement(panels[-1], table)


def _draw_losses(axes: Axes, pairs: pd.DataFrame, truth: str, table: pd.DataFrame) -> None:
    taus = table[(table["truth"] == truth) & (table["predictor"] == "inherited")].set_index("among")["tau"]
    for equal, colour, name in ((False, GREY, "other totals"), (True, COLOURS[0], "equal total")):
        if len(rows := pairs[pairs["equal_total"] == equal]):
            axes.errorbar(rows["inherited"], rows["mean"], rows["spread"], fmt="o", ms=4, color=colour, label=name)
    axes.set(xlabel="inherited loss (nats/token)", ylabel=f"loss {TRUTHS[truth]} (nats/token)")
    among_equal = f", among equal totals {taus['equal total']:.2f}" if "equal total" in taus else ""
    axes.set_title(f"Kendall's τ {taus['all']:.2f}{among_equal}", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.legend(fontsize=8)


def _draw_agreement(axes: Axes, table: pd.DataFrame) -> None:
    groups = table[["truth", "among"]].drop_duplicates().reset_index(drop=True)
    places = np.arange(len(groups))
    for index, (predictor, colour) in enumerate(zip(PREDICTORS, (COLOURS[0], GREY), strict=True)):
        rows = groups.merge(table[table["predictor"] == predictor], on=["truth", "among"])
        at = places + 0.36 * index - 0.18
        errors = [(rows["tau"] - rows["low"]).clip(lower=0), (rows["high"] - rows["tau"]).clip(lower=0)]
        axes.bar(at, rows["tau"], width=0.32, color=colour, label=PREDICTORS[predictor])
        axes.errorbar(at, rows["tau"], yerr=errors, fmt="none", color="black", linewidth=0.8, capsize=2)
        axes.plot(at, rows["by_chance"], "k_", ms=14, label=None if index else "with random changes")
        several = rows["one_seed"].where(rows["seeds"] > 1)
        axes.plot(at, several, "wD", mec="black", ms=4, label=None if index else "with single seeds")
    ceilings = table.drop_duplicates(["truth", "among"])["ceiling"].to_numpy()
    axes.hlines(ceilings, places - 0.4, places + 0.4, color=COLOURS[1], label="other seeds with single seeds")
    labels = [f"{TRUTHS[truth]},\n{among}" for truth, among in groups.itertuples(index=False)]
    axes.set_xticks(places, labels, fontsize=7, rotation=20)
    axes.set(ylabel="Kendall's τ, 95 % interval", ylim=(min(-0.05, axes.get_ylim()[0]), 1.05))
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def agreement_table(table: pd.DataFrame) -> Table:
    """The agreements for the terminal."""
    narrow: dict[str, Any] = {"box": None, "collapse_padding": True, "pad_edge": False}
    shown = Table("trained", "among", "by", caption=NOTE, caption_justify="left", **narrow)
    for heading in ("n", "τ", "95 %", "cor-\nrected", "p", "1\nseed", "ceil-\ning"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        tau, corrected, p, one, ceiling = (
            "" if np.isnan(row[key]) else f"{row[key]:.2f}" for key in ("tau", "corrected", "p", "one_seed", "ceiling")
        )
        interval = "" if np.isnan(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}"
        names = row["truth"], row["among"], row["predictor"]
        shown.add_row(*names, str(row["vectors"]), tau, interval, corrected, p, one, ceiling)
    return shown


def draw_check(drawing: Figure, check: pd.DataFrame) -> None:
    """One panel per workload, with the line of perfect prediction."""
    summaries = summarise_check(check)
    rows, columns = -(-len(summaries) // _COLUMNS), min(len(summaries), _COLUMNS)
    drawing.set_size_inches(max(4.2, 3.4 * columns), 0.6 + 3.1 * rows)
    panels = drawing.subplots(rows, columns, squeeze=False).flatten()
    for axes, summary, (_, models) in zip(panels, summaries, check.groupby(WORKLOAD), strict=False):
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
