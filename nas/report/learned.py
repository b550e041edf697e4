"""What a search has learned of the loss: the sampler's model of it, fitted again to all evaluated vectors."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from nas.search.loss_model import LossModel
from nas.space import SearchSpace, format_vector, parse_vector

_LEAST = 3  # evaluated vectors from which there is something to learn
_MOVES = ["base", "layer", "groups", "change_nats", "deviation_nats", "source"]


def learned(trials: pd.DataFrame, space: SearchSpace, bases: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the model expects of different evaluated vectors, and of the ``bases`` among them if one layer changes.

    Returns:
        The trials with ``expected_nats, expected_low, expected_high``: the loss of each by all the others, and one
        standard deviation around it. Without these columns where too few were evaluated.
        One row for each base, layer and other choice: ``base, layer, groups, change_nats, deviation_nats, source``.
        Where the changed vector was evaluated the change is the ``inherited`` one, without deviation; elsewhere the
        model's, ``estimated``, with its standard deviation.
    """
    if len(trials) < _LEAST:
        return trials, pd.DataFrame(columns=_MOVES)
    levels = np.unique(np.concatenate(space.choices))
    vectors_NL = np.searchsorted(levels, [parse_vector(text) for text in trials["vector"]])
    model = LossModel(vectors_NL, trials["loss_nats"].to_numpy(dtype=float, copy=True), len(levels))
    expected, deviations = model.left_out()
    trials = trials.assign(
        expected_nats=expected, expected_low=expected - deviations, expected_high=expected + deviations
    )
    rows, moved = [], []
    for base in bases:
        vector = parse_vector(base)
        for layer, allowed in enumerate(space.choices):
            for groups in (groups for groups in allowed if groups != vector[layer]):
                moved.append((*vector[:layer], groups, *vector[layer + 1 :]))
                rows.append((base, layer, groups))
    known = dict(zip(trials["vector"], trials["loss_nats"], strict=True))
    losses = np.array([known.get(format_vector(vector), np.nan) for vector in moved])
    estimated = np.isnan(losses)
    moved_NL = np.searchsorted(levels, np.array(moved).reshape(-1, len(space.choices)))
    moves = pd.DataFrame(rows, columns=_MOVES[:3])
    return trials, moves.assign(
        change_nats=np.where(estimated, model.means(moved_NL), losses) - moves["base"].map(known),
        deviation_nats=np.where(estimated, model.deviations(moved_NL), 0.0),
        source=np.where(estimated, "estimated", "inherited"),
    )
