"""The views of report.html, in Bokeh: each draws a part of what was found; those of vectors share one data source."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bokeh.models as bm
import numpy as np
import pandas as pd
from bokeh import layouts
from bokeh.plotting import figure

from nas.metrics import LOSS, METRICS, PAIRED_SE
from nas.report.figure import COLOURS, GREY, shades
from nas.space import parse_vector

_COUNTED = ("batch", "kv_bytes_per_token", "parameters", "memory_gib")  # all other costs follow from the latency
REFERENCE = "reference"  # the label of the front that others are measured by
_BOUNDS = ("decode_ms_low", "decode_ms_high")
_MARKERS = ("circle", "triangle", "diamond", "square")
_SELECT: Any = {"tools": "tap,box_select,lasso_select,wheel_zoom,pan,reset,save", "active_drag": "box_select"}
_CHOOSE = """\
source.data.x = source.data[cost.value]
source.change.emit()
for (const [of, mark] of shown) mark.visible = of == cost.value
axes[0].axis_label = labels[cost.value]
const scales = [0, 1].map(axis => log.active.includes(axis) ? logs : linear)
plot.setv({x_scale: scales[0][0], y_scale: scales[1][0]})
axes.forEach((axis, at) => axis.setv({ticker: scales[at][1], formatter: scales[at][2]}))
"""


@dataclass(frozen=True)
class Page:
    """What the page shows: of one search, or of several whose losses and costs mean the same."""

    title: str
    caption: str
    vectors: pd.DataFrame  # one row each, numbered: `COLUMNS`, name, uniform, label, times, evaluation, command, …
    fronts: pd.DataFrame  # `nas.report.front.attained`
    volumes: pd.DataFrame  # `nas.report.front.curves`
    reference: str  # the hypervolume's reference point
    limits: Mapping[str, float]  # by metric
    levels: Sequence[int]  # the groups that layers may have, ascending
    moves: pd.DataFrame  # of `nas.report.learned.learned`; may be empty, as may be what follows
    check: pd.DataFrame  # predicted and measured end-to-end models
    runs: pd.DataFrame  # a row each: what differs between their configs, and their metrics

    @property
    def colours(self) -> dict[str, str]:
        """By label of the runs."""
        return dict(zip(self.volumes["label"].unique(), itertools.cycle(COLOURS)))

    @property
    def front(self) -> pd.DataFrame:
        """The vectors on the front, lowest loss first."""
        return self.vectors[self.vectors["on_front"]].sort_values(LOSS, kind="stable")


def origin(metric: str) -> str | None:
    """Where a metric's values come from; None: the latency_source of each vector says so."""
    return {LOSS: "inherited", PAIRED_SE: "measured"}.get(metric, "counted" if metric in _COUNTED else None)


def costs(vectors: pd.DataFrame) -> list[str]:
    """The metrics, loss aside, that are not the same for all vectors; all of them if there is but one vector."""
    columns = [name for name, metric in METRICS.items() if metric.derive and name in vectors and name not in _BOUNDS]
    return [name for name in columns if vectors[name].nunique() > 1] or columns


def _source(table: pd.DataFrame, name: str | None = None) -> bm.ColumnDataSource:
    return bm.ColumnDataSource({str(key): column.to_numpy() for key, column in table.items()}, name=name)


def marked(found: Page, cost: str) -> bm.ColumnDataSource:
    """The vectors, and how each is marked: what all views share."""
    vectors, on_front, uniform = found.vectors, found.vectors["on_front"], found.vectors["uniform"]
    known = ~uniform & (vectors["name"] != "")
    several = len(found.colours) > 1
    kind = vectors["label"] if several else on_front.map({True: "Pareto front", False: "evaluated"})
    kind = kind.mask(uniform, "uniform").mask(known, "known")
    by_kind = {"evaluated": GREY, "Pareto front": COLOURS[0], "uniform": COLOURS[1], "known": COLOURS[2]}
    marks = vectors.assign(
        x=vectors[cost],
        kind=kind,
        colour=vectors["label"].map({"several": "#444444"} | found.colours) if several else kind.map(by_kind),
        marker=np.select([uniform, known], ["square", "star"], "circle"),
        size=np.select([uniform | known, on_front], [12, 9], 6),
        alpha=np.where(on_front | uniform | known, 0.95, 0.45),
        column=vectors.loc[on_front, LOSS].rank(method="first").reindex(vectors.index) - 1,
    )
    return _source(marks, "vectors")


def _plot(x_label: str, y_label: str, tools: str = "wheel_zoom,pan,box_zoom,reset,save", **more: Any) -> figure:
    """A plot whose legend, if it gets one, is a line above."""
    plot = figure(height=400, sizing_mode="stretch_width", tools=tools, active_scroll=None, **more)
    plot.toolbar.logo = None
    plot.xaxis.axis_label, plot.yaxis.axis_label = x_label, y_label
    plot.axis.axis_label_text_font_style = "normal"
    plot.title.text_font_size = "12px"
    plot.add_layout(bm.Legend(orientation="horizontal", border_line_color=None, padding=0, ncols="auto"), "above")
    return plot


def _label(found: Page, metric: str) -> str:
    sources = " and ".join(sorted(found.vectors["latency_source"].unique()))
    return METRICS[metric].label if metric == LOSS else f"{METRICS[metric].label}, {origin(metric) or sources}"


def _scatter(plot: figure, source: bm.ColumnDataSource, x: str, y: str, hover: dict[str, Any], **more: Any) -> None:
    """The vectors as points which are marked when they are selected or hovered over in any view."""
    look = {"marker": "marker", "size": "size", "color": "colour", "alpha": "alpha"}
    points = plot.scatter(x, y, source=source, **look, **more)
    marked = points.glyph.clone(fill_alpha=1.0, line_color="black", line_width=2.5, line_alpha=1.0)
    points.selection_glyph, points.hover_glyph = marked, marked.clone()
    points.nonselection_glyph = points.glyph.clone(fill_alpha=0.2, line_alpha=0.2)
    plot.add_tools(bm.HoverTool(renderers=[points], **hover))


def _where(rows: "pd.Series[bool]") -> bm.CDSView:
    return bm.CDSView(filter=bm.BooleanFilter(rows.tolist()))


def draw_front(found: Page, source: bm.ColumnDataSource, cost: str, hover: dict[str, Any]) -> tuple[Any, Any]:
    """Loss against a cost, and the controls that choose which and how."""
    plot = _plot(_label(found, cost), _label(found, LOSS), **_SELECT)
    plot.x_range.only_visible = True
    plot.x_range.range_padding = plot.y_range.range_padding = 0.25  # of what is shown; room for names
    shown = list(_draw_steps(plot, found))
    for metric, bound in found.limits.items():
        limit = bm.Span(location=bound, dimension="height", line_dash="dashed", line_color="black")
        name = bm.Label(x=bound, y=0, y_units="screen", text=f" limit {bound:g}", text_font_size="11px")
        for mark in (limit, name):
            plot.add_layout(mark)
            shown.append((metric, mark))
    if set(_BOUNDS) <= set(found.vectors):
        ends = {"x0": _BOUNDS[0], "x1": _BOUNDS[1], "y0": LOSS, "y1": LOSS}
        on_front = _where(found.vectors["on_front"])
        interval = plot.segment(**ends, source=source, view=on_front, line_color="colour", line_alpha=0.5)
        shown.append(("decode_ms", interval))
    for metric, mark in shown:
        mark.visible = metric == cost
    if "loss_after_nats" in found.vectors:
        _draw_trained(plot, source)
    _scatter(plot, source, "x", LOSS, hover, legend_group="kind")
    look: Any = {"text_align": "center", "text_font_size": "11px", "nonselection_text_alpha": 1.0}
    plot.text("x", LOSS, "name", source=source, view=_where(found.vectors["name"] != ""), y_offset=-9, **look)
    return plot, _controls(plot, found, source, cost, shown)


def _draw_steps(plot: Any, found: Page) -> Iterator[tuple[str, Any]]:
    """The fronts against every cost: pairs of a cost and what belongs to that alone."""
    for key, rows in found.fronts.groupby(["metric", "label"], sort=False):
        metric, label = map(str, key)
        colour = found.colours.get(label, "black")
        steps, mode = _source(rows), "before" if METRICS[metric].maximise else "after"
        if not (rows["low"] == rows["high"]).all():
            band = bm.VAreaStep(x="cost", y1="low", y2="high", step_mode=mode, fill_color=colour, fill_alpha=0.15)
            yield metric, plot.add_glyph(steps, band)
        dash = "dotted" if label == REFERENCE else "solid"
        look = {"color": colour, "line_dash": dash, "line_width": 1.5}
        yield metric, plot.step("cost", "median", source=steps, mode=mode, **look)


def _controls(plot: Any, found: Page, source: bm.ColumnDataSource, cost: str, shown: list[tuple[str, Any]]) -> Any:
    """What chooses the cost, with what is ``shown`` of each alone, and logarithmic axes."""
    labels = {metric: METRICS[metric].label for metric in costs(found.vectors)}
    chooser = bm.Select(title="Cost", value=cost, options=list(labels.items()), width=260)
    logarithmic = bm.CheckboxGroup(labels=["log cost", "log loss"], active=[], inline=True, align="end")
    models = {
        "source": source,
        "plot": plot,
        "axes": [plot.xaxis[0], plot.yaxis[0]],
        "cost": chooser,
        "log": logarithmic,
        "shown": shown,
        "labels": {metric: _label(found, metric) for metric in labels},
        "linear": [bm.LinearScale(), bm.BasicTicker(), bm.BasicTickFormatter()],
        "logs": [bm.LogScale(), bm.LogTicker(), bm.LogTickFormatter(min_exponent=5)],
    }
    choose = bm.CustomJS(args=models, code=_CHOOSE)
    chooser.js_on_change("value", choose)
    logarithmic.js_on_change("active", choose)
    return layouts.row(chooser, logarithmic)


def _draw_trained(plot: Any, source: bm.ColumnDataSource) -> None:
    """The losses that training has made of some vectors', joined to those before."""
    plot.yaxis.axis_label = "validation loss (nats/token), inherited and trained"
    ends = {"x0": "x", "x1": "x", "y0": "loss_before_nats", "y1": "loss_after_nats"}
    plot.segment(**ends, source=source, line_color=COLOURS[3], line_alpha=0.6)
    triangle = {"marker": "inverted_triangle", "size": 9, "color": COLOURS[3], "legend_label": "trained"}
    trained = plot.scatter("x", "loss_after_nats", source=source, **triangle)
    said = [("vector", "@vector"), ("inherited loss, rank", "@loss_before_nats{0.00000}, @rank_before")]
    said += [("trained loss, rank", "@loss_after_nats{0.00000}, @rank_after")]
    plot.add_tools(bm.HoverTool(renderers=[trained], tooltips=said))


def draw_layers(found: Page, source: bm.ColumnDataSource, hover: dict[str, Any]) -> tuple[Any, Any]:
    """A heat map of layers by vectors, whose cells page.js fills, and a frame per vector that takes part in linking."""
    front = found.front
    groups = np.array([parse_vector(vector) for vector in front["vector"]]).T
    layers, width = groups.shape
    image = np.searchsorted(found.levels, groups).astype(float)
    cells = bm.ColumnDataSource({"image": [image], "width": [width]}, tags=[",".join(map(str, front.index))])
    ranges = {"x_range": bm.Range1d(-0.5, width - 0.5), "y_range": bm.Range1d(layers - 0.5, -0.5)}
    plot = _plot("vectors, lowest loss first", "layer", **_SELECT, **ranges)
    colours = bm.LinearColorMapper(palette=shades(len(found.levels)), low=-0.5, high=len(found.levels) - 0.5)
    place: dict[str, Any] = {"x": -0.5, "y": -0.5, "dw": "width", "dh": layers, "anchor": "bottom_left"}
    plot.image("image", **place, source=cells, color_mapper=colours, origin="top_left")
    frame = {"line_color": COLOURS[1], "line_width": 2.5, "fill_alpha": 0.0}
    look = {"fill_alpha": 0.0, "line_color": "white", "line_alpha": 0.6}
    vectors = plot.rect("column", (layers - 1) / 2, 1, layers, source=source, **look)
    vectors.selection_glyph = vectors.glyph.clone(**frame)
    vectors.hover_glyph = vectors.glyph.clone(**frame | {"line_color": "black"})
    vectors.nonselection_glyph = vectors.glyph.clone(fill_color="white", fill_alpha=0.5)
    plot.add_tools(bm.HoverTool(renderers=[vectors], **hover))
    plot.xgrid.visible = plot.ygrid.visible = False
    plot.yaxis.ticker = bm.SingleIntervalTicker(interval=1 if layers <= 16 else 4, num_minor_ticks=0)
    plot.xaxis.ticker = bm.BasicTicker(min_interval=1)
    return plot, cells


def draw_moves(found: Page) -> tuple[Any, Any]:
    """Changes of the loss by layer, of one base at a time: that of the filter."""
    table, count = found.moves, len(found.levels)
    plot = _plot("layer", "change of the loss (nats/token)")
    moved = bm.GroupFilter(column_name="base", group=table["base"].iloc[0] if len(table) else "")
    plot.title.text = f"Each layer of {moved.group} alone with other groups"
    colours, markers = np.resize(COLOURS, count), np.resize(_MARKERS, count)
    for level, colour, marker in zip(found.levels, colours, markers, strict=True):
        name = f"{level} group{'s' * (level > 1)}"
        plot.scatter([np.nan], [np.nan], color=colour, marker=marker, size=7, legend_label=name)  # whatever the base
    at = np.searchsorted(found.levels, table["groups"])
    moves = table.assign(
        x=table["layer"] + (at - (count - 1) / 2) * 0.5 / count,
        low=table["change_nats"] - table["deviation_nats"],
        high=table["change_nats"] + table["deviation_nats"],
        colour=colours[at],
        marker=markers[at],
        fill=np.where(table["source"] == "inherited", colours[at], "white"),
    )
    shown: Any = {"source": _source(moves), "view": bm.CDSView(filter=moved), "line_color": "colour"}
    plot.segment("x", "low", "x", "high", **shown)
    points = plot.scatter("x", "change_nats", fill_color="fill", marker="marker", size=7, **shown)
    change = "@change_nats{0.00000} ± @deviation_nats{0.00000} nats, @source"
    said = [("layer", "@layer"), ("groups", "@groups"), ("change", change)]
    plot.add_tools(bm.HoverTool(renderers=[points], tooltips=said))
    plot.add_layout(bm.Span(location=0, dimension="width", line_color="black", line_width=1))
    plot.xaxis.ticker = bm.BasicTicker(min_interval=1)
    return plot, moved


def draw_left_out(source: bm.ColumnDataSource, hover: dict[str, Any]) -> Any:
    """Expected against evaluated losses."""
    plot = _plot("inherited loss (nats/token)", "expected loss (nats/token)", **_SELECT)
    plot.add_layout(bm.Slope(gradient=1, y_intercept=0, line_color="black", line_width=1))
    plot.segment(LOSS, "expected_low", LOSS, "expected_high", source=source, line_color="colour", line_alpha=0.4)
    expected = [*hover["tooltips"], ("expected loss", "@expected_nats{0.00000}")]
    _scatter(plot, source, LOSS, "expected_nats", hover | {"tooltips": expected})
    return plot


def draw_volumes(found: Page, source: bm.ColumnDataSource, hover: dict[str, Any]) -> Any:
    """Hypervolume by evaluations, with a band for several runs; of a single one each point is the vector evaluated."""
    alone = len(found.colours) == 1 and (found.volumes["runs"] == 1).all()
    plot = _plot("evaluated vectors", "hypervolume", **(_SELECT if alone else {}))
    plot.title.text = f"reference point: {found.reference}"
    for label, rows in found.volumes.groupby("label", sort=False):
        colour, steps, runs = found.colours[str(label)], _source(rows), int(rows["runs"].max())
        band = bm.VAreaStep(x="evaluations", y1="low", y2="high", step_mode="after", fill_color=colour, fill_alpha=0.15)
        plot.add_glyph(steps, band)
        name = {} if alone else {"legend_label": f"{label} ({runs} run{'s' * (runs > 1)})"}
        plot.step("evaluations", "median", source=steps, mode="after", color=colour, line_width=1.5, **name)
    if alone:
        source.data["hypervolume"] = found.volumes["median"].to_numpy()
        _scatter(plot, source, "evaluation", "hypervolume", hover)
    return plot


def draw_check(check: pd.DataFrame) -> Any:
    """Relative errors of predicted latencies, by measured one."""
    plot = _plot("measured (ms)", "predicted, relative to measured", x_axis_type="log")
    table = check.assign(
        error=check["predicted_ms"] / check["measured_ms"] - 1,
        colour=check["phase"].map({"decode": COLOURS[0], "prefill": COLOURS[1]}),
        marker=check["phase"].map({"decode": "circle", "prefill": "triangle"}),
    )
    look = {"color": "colour", "marker": "marker", "size": 7, "legend_group": "phase"}
    points = plot.scatter("measured_ms", "error", source=_source(table), **look)
    said = [(name, f"@{name}") for name in ("vector", "batch", "length", "measured_ms", "predicted_ms")]
    plot.add_tools(bm.HoverTool(renderers=[points], tooltips=[*said, ("error", "@error{0.0%}")]))
    plot.add_layout(bm.Span(location=0, dimension="width", line_color="black", line_width=1))
    plot.yaxis.formatter = bm.NumeralTickFormatter(format="0.0%")
    return plot


def draw_table(found: Page, source: bm.ColumnDataSource, metrics: Sequence[str]) -> tuple[Any, Any]:
    """The table of all vectors, and the filter that says which of them it shows."""
    rows = bm.BooleanFilter([True] * len(found.vectors))
    columns = []
    for name in ("vector", "name", *metrics, "on_front", "latency_source", "label", "evaluation"):
        width = 260 if name == "vector" else max(80, 9 * len(name))
        columns.append(bm.TableColumn(field=name, title=name, width=width))
        if name in metrics:
            columns[-1].formatter = _number(name)
    look = {"sizing_mode": "stretch_width", "height": 420, "autosize_mode": "none", "index_position": None}
    look |= {"selectable": "checkbox", "reorderable": False}
    return bm.DataTable(source=source, view=bm.CDSView(filter=rows), columns=columns, **look), rows


def _number(metric: str) -> bm.NumberFormatter:
    whole = METRICS[metric].unit in ("sequences", "bytes/token", "")
    shown = "0.00000" if metric in (LOSS, PAIRED_SE) else "0,0" if whole else "0,0.000"
    return bm.NumberFormatter(format=shown, text_align="right")
