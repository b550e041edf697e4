"""One look for all figures: a short title, one caption line below, and how they are saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nas.files import write_atomically

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#9AA0A6"
_CAPTION_PT = 6.5

_STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "gqa-nas",  # the same figure gives the same SVG
}


def shades(count: int) -> list[str]:
    """So many blues, from light to dark."""
    return list(map(to_hex, colormaps["Blues"](np.linspace(0.15, 0.85, count) if count > 1 else [0.5])))


@contextmanager
def figure(path: Path, title: str = "", caption: str = "", width: float = 6.4, height: float = 4.2) -> Iterator[Figure]:
    """A figure of so many inches that is saved as ``path`` with .png and .svg when the block ends.

    The caption is one line below: what is too long for the width is cut, and the files' metadata have all of it.
    """
    with plt.rc_context(_STYLE):
        drawing = plt.figure(figsize=(width, height), layout="constrained")
        try:
            yield drawing
            if title:
                drawing.suptitle(title, fontsize=10)
            if caption:
                drawing.supxlabel(_fitting(drawing, caption), fontsize=_CAPTION_PT, color="#5F6368")
            for suffix in ("png", "svg"):
                metadata = {"Title": title, "Description": caption} | ({"Date": None} if suffix == "svg" else {})
                save = partial(drawing.savefig, format=suffix, metadata=metadata)
                write_atomically(path.with_suffix(f".{suffix}"), save)
        finally:
            plt.close(drawing)


def _fitting(drawing: Figure, text: str) -> str:
    """The text, cut after as many characters as fit into the figure's width in one line."""
    written = drawing.text(0, 0, text, fontsize=_CAPTION_PT)
    width = written.get_window_extent().width
    written.remove()
    fits = int(len(text) * 0.97 * drawing.bbox.width / max(width, 1))
    return text if len(text) <= fits else text[: fits - 1].rstrip(" ,;") + "…"
