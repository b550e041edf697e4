"""How large report.html is, and how long a browser takes to open it and to mark a selection, by evaluated vectors.

The vectors are random ones of `decilm-6b` with made-up losses and costs. Needs Debian's chromium and Playwright
(`pip install playwright`). Medians of several openings are written to a CSV.

    python scripts/bench_report.py docs/report/opening.csv
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from shared import argument_parser

from nas.files import write_csv
from nas.report.front import attained, curves, front_points, reference_text
from nas.report.learned import learned
from nas.report.page import draw_page
from nas.report.views import Page, costs
from nas.run import origin
from nas.search import Objectives, on_front, reference_point
from nas.space import format_vector, load_space

VECTORS, TIMES = (100, 500, 2000), 5
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OPENED = "window.Bokeh?.documents[0]?.is_idle"
MARK = "const source = Bokeh.documents[0].get_model_by_name('vectors'); source.selected.indices = [{}]"
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def made_up(vectors: int) -> str:
    """The page of a search of so many vectors."""
    space, rng = load_space("decilm-6b"), np.random.default_rng(0)
    drawn = np.array([rng.choice(allowed, vectors) for allowed in space.choices]).T
    saved = np.abs(rng.normal(0.001, 0.001, len(space.choices)))
    loss = 3.5 + (4 - drawn) @ saved + rng.normal(0, 0.001, vectors)
    decode = 7.0 + 0.02 * drawn.sum(axis=1)
    columns = {"decode_ms": decode, "tokens_per_s": 64e3 / decode, "kv_bytes_per_token": 512 * drawn.sum(axis=1)}
    trials = pd.DataFrame({"vector": list(map(format_vector, drawn.tolist())), "loss_nats": loss, **columns})
    trials = trials.assign(batch=64, parameters=6e9 + 4e6 * drawn.sum(axis=1), latency_source="estimated")
    objectives = Objectives(("loss_nats", "tokens_per_s"))
    trials["on_front"] = on_front(trials, objectives)
    points = front_points(trials.drop_duplicates("vector", ignore_index=True), space.reference_vectors())
    reference, runs = reference_point(points, objectives), [("front", points)]
    volumes = curves(runs, objectives, reference)
    found, moves = learned(points, space, points.loc[points["on_front"], "vector"])
    found = found.assign(label="front", times=1, evaluation=volumes["evaluations"])
    found["command"] = "nas export run=runs/search/made-up select=" + found["vector"]
    return draw_page(
        Page(
            title="made up",
            caption="random vectors with made-up losses and costs",
            vectors=found,
            fronts=attained(runs, costs(found)),
            volumes=volumes,
            reference=reference_text(objectives, reference),
            limits={},
            levels=[1, 2, 4],
            moves=moves,
            check=pd.DataFrame(),
            runs=pd.DataFrame(),
        ),
        objectives,
    )


def opened(file: Path) -> dict[str, float]:
    """Seconds to open a page until nothing is left to draw, and from a selection to the frame that shows it."""
    from playwright.sync_api import sync_playwright

    seconds, marked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        for index in range(TIMES):
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            begin = time.perf_counter()
            page.goto(file.as_uri())
            page.wait_for_function(OPENED)
            seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            page.evaluate(MARK.format(index))
            page.evaluate(PAINTED)
            marked.append(time.perf_counter() - begin)
            page.close()
        browser.close()
    return {"open_s": statistics.median(seconds), "select_s": statistics.median(marked)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("csv", type=Path)
    file = parser.parse_args().csv
    rows: list[dict[str, Any]] = []
    for vectors in VECTORS:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "report.html"
            begin = time.perf_counter()
            page.write_text(made_up(vectors), encoding="utf-8")
            made = {"vectors": vectors, "make_s": time.perf_counter() - begin, "bytes": page.stat().st_size}
            rows.append(made | opened(page) | origin())
        print(rows[-1])
    write_csv(file, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
