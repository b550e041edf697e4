"""Which layers keep how many groups along the front: a heat map of layer × front point."""

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from nas.report.figure import FigureSize
from nas.space import parse_vector


def group_matrix(front: pd.DataFrame) -> pd.DataFrame:
    """Groups by layer (rows) and front point (columns, labelled with the loss), lowest loss first."""
    ordered = front.sort_values("loss_nats")
    vectors = np.array([parse_vector(text) for text in ordered["vector"]]).T
    return pd.DataFrame(vectors, columns=[f"{loss:.4f}" for loss in ordered["loss_nats"]])


def groups_size(matrix: pd.DataFrame) -> FigureSize:
    """Width and height of the heat map's figure in inches, which leave room for every cell."""
    layers, points = matrix.shape
    return {"width": max(5.0, 2.0 + 0.32 * points), "height": max(4.2, 1.8 + 0.16 * layers)}


def draw_groups(drawing: Figure, matrix: pd.DataFrame) -> None:
    """Draws the heat map; small ones carry their numbers."""
    axes = drawing.subplots()
    choices = np.unique(matrix.to_numpy())
    shades = np.linspace(0.15, 0.85, len(choices)) if len(choices) > 1 else np.array([0.5])
    colours = ListedColormap([_blues(shade) for shade in shades])
    edges = np.concatenate(([choices[0] - 0.5], (choices[:-1] + choices[1:]) / 2, [choices[-1] + 0.5]))
    image = axes.imshow(
        matrix, aspect="auto", cmap=colours, norm=BoundaryNorm(edges, colours.N), interpolation="nearest"
    )
    axes.set(xlabel="front point, by loss (nats/token)", ylabel="layer")
    axes.set_xticks(range(matrix.shape[1]), matrix.columns, rotation=60, ha="right", fontsize=7)
    step = 1 if len(matrix) <= 16 else 4
    axes.set_yticks(range(0, len(matrix), step))
    axes.grid(False)
    if matrix.size <= 400:
        for (layer, point), groups in np.ndenumerate(matrix.to_numpy()):
            dark = shades[np.searchsorted(choices, groups)] > 0.5
            axes.text(
                point, layer, str(groups), ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    bar = drawing.colorbar(image, ax=axes, ticks=choices, shrink=0.6)
    bar.ax.set_yticklabels([str(g) for g in choices])
    bar.set_label("KV groups")


def _blues(shade: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["Blues"](shade)
