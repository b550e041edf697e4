"""Which layers keep how many groups along the front: a heat map of layer × front point."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from nas.space import parse_vector


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
    choices = np.unique(matrix.to_numpy())
    shades = np.linspace(0.15, 0.85, len(choices)) if len(choices) > 1 else np.array([0.5])
    colours = ListedColormap(colormaps["Blues"](shades))
    edges = np.concatenate(([choices[0] - 0.5], (choices[:-1] + choices[1:]) / 2, [choices[-1] + 0.5]))
    norm = BoundaryNorm(edges, colours.N)
    image = axes.imshow(matrix, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axes.set(xlabel="front point, by loss (nats/token)", ylabel="layer")
    axes.set_xticks(range(points), matrix.columns, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(0, layers, 1 if layers <= 16 else 4))
    axes.grid(False)
    if matrix.size <= 400:
        for (layer, point), groups in np.ndenumerate(matrix.to_numpy()):
            colour = "white" if shades[np.searchsorted(choices, groups)] > 0.5 else "black"
            axes.text(point, layer, str(groups), ha="center", va="center", fontsize=7, color=colour)
    bar = drawing.colorbar(image, ax=axes, ticks=choices, shrink=0.6, label="KV groups")
    bar.ax.set_yticklabels(list(map(str, choices)))
