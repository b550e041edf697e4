"""One look for all figures, and how they are saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from nas.files import write_atomically

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#9AA0A6"

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


@contextmanager
def figure(path: Path, width: float = 6.4, height: float = 4.2) -> Iterator[Figure]:
    """A figure that is saved as ``path`` with .png and .svg when the block ends."""
    with plt.rc_context(_STYLE):
        drawing = plt.figure(figsize=(width, height), layout="constrained")
        try:
            yield drawing
            for suffix in ("png", "svg"):
                metadata = {"Date": None} if suffix == "svg" else {}
                save = partial(drawing.savefig, format=suffix, metadata=metadata)
                write_atomically(path.with_suffix(f".{suffix}"), save)
        finally:
            plt.close(drawing)
