"""The front: among all evaluated vectors, layer by layer, in the terminal; and how fast a search finds it."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from nas.metrics import METRICS
from nas.ranking import order_sentence
from nas.report.figure import COLOURS, GREY, shades
from nas.search.exact import Floats
from nas.search.pareto import Objectives, hypervolume_curve
from nas.space import Vector, format_vector, parse_vector

_TABLE = {  # heading and format of each column in the terminal
    "loss_nats": ("loss\nnats", "{:.4f}"),
    "tokens_per_s": ("tokens\n/s", "{:,.0f}"),
    "decode_ms": ("decode\nms", "{:.3f}"),
    "prefill_ms": ("prefill\nms", "{:.2f}"),
    "ttft_ms": ("TTFT\nms", "{:.2f}"),
    "kv_bytes_per_token": ("KV B\n/token", "{:,}"),
    "latency_source": ("latency", "{}"),
}


def front_points(trials: pd.DataFrame, reference_vectors: Mapping[str, Vector]) -> pd.DataFrame:
    """The trials with the names of the reference vectors: column ``name`` (empty for most) and ``uniform``."""
    names: dict[str, list[str]] = {}
    for name, vector in reference_vectors.items():
        names.setdefault(format_vector(vector), []).append(name)
    named = trials["vector"].map({vector: " = ".join(own) for vector, own in names.items()}).fillna("")
    return trials.assign(name=named, uniform=named.str.startswith("uniform "))


def draw_front(
    drawing: Figure, points: pd.DataFrame, objectives: Objectives, reference: Sequence[pd.DataFrame] = ()
) -> None:
    """One panel for each pair of objectives, with the front of a ``reference`` search, if there is one."""
    pairs = list(itertools.combinations(objectives.names, 2))
    drawing.set_figwidth(6.4 if len(pairs) == 1 else 4.6 * len(pairs))
    panels = drawing.subplots(1, len(pairs), squeeze=False)[0]
    for panel, (y, x) in zip(panels, pairs, strict=True):
        for trials in reference:
            found = trials[trials["on_front"]]
            panel.plot(found[x], found[y], "k+", label=f"reference's front ({len(found)})", zorder=3.5)
        _draw_pair(panel, points, x, y, staircase=len(pairs) == 1)
    panels[0].legend(loc="best", fontsize=8)


def _draw_pair(axes: Axes, points: pd.DataFrame, x: str, y: str, staircase: bool) -> None:
    front = points[points["on_front"]].sort_values(x)
    axes.scatter(points[x], points[y], s=14, color=GREY, label=f"evaluated ({len(points)})")
    if staircase:
        where = "pre" if METRICS[x].maximise else "post"  # the best y among points at least as good in x
        axes.step(front[x], front[y], where=where, color=COLOURS[0], linewidth=1.2)  # type: ignore[arg-type]
    axes.scatter(front[x], front[y], s=26, color=COLOURS[0], label=f"Pareto front ({len(front)})", zorder=3)
    axes.margins(x=0.18)  # room for the names
    left, up = (1 if METRICS[x].maximise else -1), (-1 if METRICS[y].maximise else 1)  # where no front point is
    ha, va = ("right" if left > 0 else "left"), ("bottom" if up > 0 else "top")
    known = ~points["uniform"] & (points["name"] != "")
    marks = (("uniform", points["uniform"], "s", 70, COLOURS[1]), ("known", known, "*", 170, COLOURS[2]))
    for label, chosen, marker, size, colour in marks:
        rows = points[chosen]
        if rows.empty:
            continue
        axes.scatter(rows[x], rows[y], size, marker=marker, facecolors="none", edgecolors=colour, label=label, zorder=4)
        for _, row in rows.iterrows():
            text = axes.annotate(row["name"], (row[x], row[y]), (-6 * left, 6 * up), textcoords="offset points")
            text.set(fontsize=8, color=colour, ha=ha, va=va, zorder=2.5)
            text.set_bbox({"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5})
    axes.set(xlabel=_label(points, x), ylabel=_label(points, y))


def _label(points: pd.DataFrame, name: str) -> str:
    """A metric's label, with where its values come from if they are times."""
    source = " and ".join(sorted(points["latency_source"].unique()))
    timed = METRICS[name].unit in ("ms", "tokens/s")
    return METRICS[name].label + (f" — {source}" if timed else "")


def draw_trained(drawing: Figure, trained: pd.DataFrame, objectives: Objectives) -> None:
    """Losses before and after a training against the first cost; ``trained`` has columns of `compare_trained` too.

    Each has a panel, for the training lowers all losses by far more than they differ; numbers are ranks before it.
    """
    cost = next(name for name in objectives.names if name != "loss_nats")
    drawing.set_figwidth(9.6)
    panels = drawing.subplots(1, 2, sharex=True)
    for axes, when, label, colour in zip(panels, ("before", "after"), ("inherited", "trained"), COLOURS, strict=False):
        losses, errors = trained[f"loss_{when}_nats"], trained[f"se_{when}_nats"]
        axes.errorbar(trained[cost], losses, errors, fmt="o", ms=4, color=colour)
        for row in trained.to_dict("records"):
            at = row[cost], row[f"loss_{when}_nats"]
            axes.annotate(f"{row['rank_before']:.0f}", at, (4, 4), textcoords="offset points", fontsize=7, color=GREY)
        axes.set(xlabel=_label(trained, cost), ylabel=f"{label} validation loss (nats/token)")
    panels[0].set_title(order_sentence(trained), fontsize=7, loc="left", in_layout=False)


def attained(runs: Iterable[tuple[str, pd.DataFrame]], costs: Sequence[str]) -> pd.DataFrame:
    """The best loss within each cost that the runs of a group found: ``metric, label, cost, median, low, high``.

    ``runs`` gives the group's label and trials of each run. Rows are the costs at which something changes, ascending;
    where some runs found nothing so cheap, the group has no row.
    """
    rows = []
    groups: dict[str, list[pd.DataFrame]] = {}
    for label, trials in runs:
        groups.setdefault(label, []).append(trials)
    for metric, (label, tables) in itertools.product(costs, groups.items()):
        sign = -1 if METRICS[metric].maximise else 1  # the cheapest first
        lines = [trials.groupby(sign * trials[metric])["loss_nats"].min().cummin() for trials in tables]
        best = pd.concat(lines, axis=1, sort=True).ffill().dropna()  # a column per run
        found = best.agg(["median", "min", "max"], axis=1).set_axis(["median", "low", "high"], axis=1)
        changes = found[(found.diff() != 0).any(axis=1)]
        rows.append(changes.assign(metric=metric, label=label, cost=sign * changes.index).sort_values("cost"))
    return pd.concat(rows, ignore_index=True)[["metric", "label", "cost", "median", "low", "high"]]


def group_matrix(front: pd.DataFrame) -> pd.DataFrame:
    """Groups by layer (rows) and front point (columns, labelled with the loss), lowest loss first."""
    ordered = front.sort_values("loss_nats")
    vectors = np.array([parse_vector(text) for text in ordered["vector"]]).T
    return pd.DataFrame(vectors, columns=[f"{loss:.4f}" for loss in ordered["loss_nats"]])


def draw_groups(drawing: Figure, matrix: pd.DataFrame) -> None:
    """Draws the heat map, with room for every cell; small ones carry their numbers."""
    layers, points = matrix.shape
    drawing.set_size_inches(max(5.0, 2.0 + 0.32 * points), max(4.2, 1.8 + 0.16 * layers))
    axes = drawing.subplots()
    levels, places = np.unique(matrix.to_numpy(), return_inverse=True)
    count, places = len(levels), places.reshape(matrix.shape)
    scale: Any = {"cmap": ListedColormap(shades(count)), "vmin": -0.5, "vmax": count - 0.5}
    image = axes.imshow(places, aspect="auto", interpolation="nearest", **scale)
    axes.set(xlabel="front point, by loss (nats/token)", ylabel="layer")
    axes.set_xticks(range(points), matrix.columns, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(0, layers, 1 if layers <= 16 else 4))
    axes.grid(False)
    if matrix.size <= 400:
        for (layer, point), place in np.ndenumerate(places):
            colour = "white" if place > (count - 1) / 2 else "black"  # on the darker shades
            axes.text(point, layer, str(levels[place]), ha="center", va="center", fontsize=7, color=colour)
    bar = drawing.colorbar(image, ax=axes, ticks=range(count), shrink=0.6, label="KV groups")
    bar.ax.set_yticklabels(list(map(str, levels)))


def front_table(front: pd.DataFrame, objectives: Objectives) -> Table:
    """The rows of front.csv: the objectives, and what else people look for; vectors may have a ``name``."""
    others = {
        name: (METRICS[name].label, "{:,}" if front[name].dtype.kind == "i" else "{:,.4g}")
        for name in objectives.names
        if name not in _TABLE
    }
    shown = {column: how for column, how in (_TABLE | others).items() if column in front}
    table = Table()
    table.add_column("vector", overflow="fold", min_width=12)
    for heading, _ in shown.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in front.to_dict("records"):
        vector = f"{row['vector']} ({row['name']})" if row.get("name") else row["vector"]
        table.add_row(vector, *(text.format(row[column]) for column, (_, text) in shown.items()))
    return table


def gain_sentence(trials: pd.DataFrame, uniform: Collection[str]) -> str:
    """What the best vectors gain over that uniform one over which most bytes are saved, or most loss if none are."""
    loss, size = trials["loss_nats"], trials["kv_bytes_per_token"]
    gains = [(0.0, 0.0, "")]
    for row in trials[trials["vector"].isin(uniform)].to_dict("records"):
        saved = 1 - size[loss <= row["loss_nats"]].min() / row["kv_bytes_per_token"]
        gains.append((saved, row["loss_nats"] - loss[size <= row["kv_bytes_per_token"]].min(), row["vector"]))
    saved, lower, vector = max(gains)
    if saved == lower == 0:
        return "No evaluated vector is better than a uniform one at its KV bytes, or smaller at its loss."
    return (
        f"Beside uniform {vector.split('-')[0]}: at its KV bytes the best evaluated vector's loss is {lower:.4f} nats "
        f"lower, and a loss as low takes {saved:.1%} fewer KV bytes."
    )


def curves(runs: Iterable[tuple[str, pd.DataFrame]], objectives: Objectives, reference: Floats) -> pd.DataFrame:
    """Hypervolume by evaluation and group over its runs: ``label, evaluations, median, low, high, runs``.

    ``runs`` gives the group's label (its sampler, say) and trials of each run; ``low`` and ``high`` are the smallest
    and largest of the group's runs that got that far.
    """
    lines = ((label, hypervolume_curve(trials, objectives, reference)) for label, trials in runs)
    volumes = pd.concat(pd.DataFrame({"label": label, "volume": line}) for label, line in lines)
    groups = volumes.assign(evaluations=volumes.index + 1).groupby(["label", "evaluations"], sort=False)["volume"]
    return groups.agg(median="median", low="min", high="max", runs="size").reset_index()


def draw_hypervolume(drawing: Figure, table: pd.DataFrame, objectives: Objectives, reference: Floats) -> None:
    """Median line of each group with the band of its runs."""
    axes = drawing.subplots()
    for colour, (label, rows) in zip(COLOURS * 9, table.groupby("label", sort=False), strict=False):
        runs = int(rows["runs"].max())
        shown, at = f"{label} ({runs} run{'s' * (runs > 1)})", rows["evaluations"]
        axes.step(at, rows["median"], where="post", color=colour, label=shown)
        axes.fill_between(at, rows["low"], rows["high"], step="post", color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="evaluated vectors", ylabel="hypervolume")
    axes.set_title(f"reference point: {reference_text(objectives, reference)}", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", fontsize=8)


def reference_text(objectives: Objectives, reference: Floats) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives.names, reference, strict=True))
