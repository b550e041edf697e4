"""The report as one page to explore: report.html, which needs nothing but a browser.

Bokeh draws it. All views of vectors share one data source, so what is hovered over or selected in one of them is marked
in all. page.js does what is left to do after that, and page.html holds the views together.
"""

from collections.abc import Sequence
from pathlib import Path

import bokeh.models as bm
from bokeh import layouts
from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.events import DocumentReady
from bokeh.resources import INLINE

from nas.metrics import METRICS, PAIRED_SE
from nas.ranking import TRAINED, order_sentence
from nas.report import views
from nas.report.views import REFERENCE, Page, costs, origin
from nas.search import Objectives
from nas.search.problem import LOSS


def draw_page(found: Page, objectives: Objectives) -> str:
    """The page as HTML."""
    cost = min(costs(found.vectors), key=lambda name: name not in objectives.names)  # the first objective, if it can be
    source = views.marked(found, cost)
    metrics = [LOSS, *({PAIRED_SE} & {*found.vectors}), *costs(found.vectors)]
    tooltips = [("vector", "@vector"), ("", "@name"), *((METRICS[name].label, f"@{name}") for name in metrics)]
    hover = {"tooltips": [*tooltips, ("latency", "@latency_source")], "point_policy": "follow_mouse"}
    front, axes = views.draw_front(found, source, cost, hover)
    layers, cells = views.draw_layers(found, source, hover)
    moves, moved = views.draw_moves(found)
    table, rows = views.draw_table(found, source, metrics)
    panels = {"volumes": views.draw_volumes(found, source, hover)}
    if len(found.moves):
        panels |= {"moves": moves, "left_out": views.draw_left_out(source, hover)}
    if len(found.check):
        panels["check"] = views.draw_check(found.check)

    columns = bm.RadioButtonGroup(labels=["front and selected", "all evaluated"], active=0)
    only = bm.RadioButtonGroup(labels=["all", "front", "selected"], active=0, align="end")
    text = bm.TextInput(title="Filter, such as: 4-4-1 decode_ms<9", width=320)
    copy = bm.Button(label="Copy table", align="end")
    update = bm.CustomJS(
        args={
            "source": source,
            "levels": list(found.levels),
            "columns": columns,
            "cells": cells,
            "range": layers.x_range,
            "text": text,
            "only": only,
            "rows": rows,
            "bases": found.moves["base"].unique().tolist(),
            "moved": moved,
            "moves_title": moves.title,
            "metrics": [(name, METRICS[name].label, origin(name)) for name in metrics],
        },
        code=_beside("page.js"),
    )
    source.selected.js_on_change("indices", update)
    for control in (columns, only):
        control.js_on_change("active", update)
    text.js_on_change("value_input", update)
    copy.js_on_click(bm.CustomJS(args={"source": source, "rows": rows, "table": table}, code=_COPY))

    document = Document(title=found.title)
    document.js_on_event(DocumentReady, update)
    roots = {"axes": axes, "front": front, "columns": columns, "layers": layers, "table": table}
    roots |= {"filters": layouts.row(text, only, copy)} | panels
    for name, root in roots.items():
        root.name = name
        document.add_root(root)
    values = {
        "caption": found.caption,
        "front": [(at, f"{row[LOSS]:.4f}  {row['name'] or row['vector']}") for at, row in found.front.iterrows()],
        "front_note": _front_note(found),
        "table_note": _table_note(metrics),
        "levels": list(zip(found.levels, views.shades(len(found.levels)), strict=True)),
        "panels": [(name, *_PANELS[name]) for name in panels],
        "runs": found.runs.to_html(border=0, index=False, na_rep="–", float_format="{:.4g}".format),
        "runs_note": _runs_note(found),
        "several": len(found.runs) > 1,
    }
    html: str = file_html(document, INLINE, title=found.title, template=_beside("page.html"), template_variables=values)
    return html


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


_COPY = """\
const names = table.columns.map(column => column.field)
const line = i => names.map(name => source.data[name][i]).join("\\t")
const kept = rows.booleans.flatMap((keep, i) => keep ? [line(i)] : [])
await navigator.clipboard.writeText([names.join("\\t"), ...kept].join("\\n") + "\\n")
cb_obj.origin.label = `Copied ${kept.length} rows`
"""
_PANELS = {
    "volumes": (
        "Hypervolume",
        "How much of the space between the reference point and the front the evaluations so far have covered.",
    ),
    "moves": (
        "What the search has learned of each layer",
        "Change of the inherited loss if one layer alone gets other groups. Filled: both were evaluated. Hollow: "
        "estimated by the loss model of the sampler, with one standard deviation. Select a vector of the front to see "
        "its moves.",
    ),
    "left_out": (
        "Can the loss model be trusted?",
        "The inherited loss of each evaluated vector, and what the model, given all others, expects it to be, with one "
        "standard deviation (estimated).",
    ),
    "check": (
        "Predicted and measured latency",
        "End-to-end models of random vectors, measured on this device, and how far the predictor was off.",
    ),
}


def _front_note(found: Page) -> str:
    """What the marks of the front mean."""
    line = "the best loss that is evaluated within each cost"
    if len(found.labels) > 1:
        line += ", median over runs, with the range of the runs"
    note = f"Every point is an evaluated vector. Line: {line}; down, and towards the better costs, is better."
    if REFERENCE in set(found.fronts["label"]):
        note += " Dotted: the reference search."
    if "loss_after_nats" in found.vectors:
        note += f" {order_sentence(found.vectors.dropna(subset=TRAINED))} (triangles: the trained losses)."
    return note


def _runs_note(found: Page) -> str:
    """How much the runs have in common."""
    times, front = found.vectors["times"], found.front["label"].value_counts()
    shares = ", ".join(f"{label} {count}" for label, count in front.items())
    return (
        f"What differs between their configs, and how good their fronts are. Together they evaluated {len(times)} "
        f"vectors, {(times > 1).sum()} of them in several runs. Who found those on the front of all: {shares}."
    )


def _table_note(metrics: Sequence[str]) -> str:
    """Where the numbers of the table come from."""
    counted, timed = (", ".join(name for name in metrics if origin(name) == of) for of in ("counted", None))
    return (
        f"{LOSS} is inherited: measured on fixed windows with the supernet's weights, and {PAIRED_SE} is the standard "
        f"error of its difference to the largest vector's. Counted: {counted}. As "
        f"latency_source says: {timed}. A click on a heading sorts; terms of the filter are parts of a vector or name, "
        "or conditions on a column."
    )
