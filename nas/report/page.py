"""The report as one page to explore: report.html, which needs nothing but a browser.

Bokeh draws it. All views of vectors share one data source, so what is hovered over or selected in one of them is marked
in all. page.js does what is left to do after that, and page.html holds the views together.
"""

from pathlib import Path

import bokeh.models as bm
from bokeh import layouts
from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.events import DocumentReady
from bokeh.resources import INLINE

from nas.metrics import LOSS, METRICS, PAIRED_SE
from nas.ranking import TRAINED, order_sentence
from nas.report import views
from nas.report.figure import shades
from nas.report.views import REFERENCE, Page, costs, origin
from nas.search import Objectives


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
    models = {"source": source, "columns": columns, "cells": cells, "range": layers.x_range}
    models |= {"text": text, "only": only, "rows": rows, "moved": moved, "moves_title": moves.title}
    known = {"levels": list(found.levels), "bases": found.moves["base"].unique().tolist()}
    known |= {"metrics": [(name, METRICS[name].label, origin(name)) for name in metrics]}
    update = bm.CustomJS(args=models | known, code=_beside("page.js"))
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
        "order": order_sentence(found.vectors.dropna(subset=TRAINED)) if "loss_after_nats" in found.vectors else "",
        "reference": REFERENCE in set(found.fronts["label"]),
        "levels": list(zip(found.levels, shades(len(found.levels)), strict=True)),
        "panels": list(panels),
        "labels": list(found.colours),
        "runs": found.runs.to_html(border=0, index=False, na_rep="–", float_format="{:.4g}".format),
        "several": len(found.runs) > 1,
        "times": found.vectors["times"],
        "finders": found.front["label"].value_counts(),
        "counted": [name for name in metrics if origin(name) == "counted"],
        "timed": [name for name in metrics if origin(name) is None],
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
