"""What a search has learned of the loss: the sampler's model of it, fitted again to all evaluated vectors."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from nas.search.exact import Ints
from nas.search.loss_model import LossModel
from nas.space import SearchSpace, Vector, format_vector, parse_vector

_LEAST, _MOST = 3, 2000  # evaluated vectors from which there is something to learn, and that the model is fitted to
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
    # Of very many, as in a large sweep, the front and the first ones: the model takes the cube of their number.
    fitted = trials.sort_values("on_front", ascending=False, kind="stable").head(_MOST).sort_index()
    losses_N = fitted["loss_nats"].to_numpy(dtype=float, copy=True)
    model = LossModel(_choices(map(parse_vector, fitted["vector"]), space), losses_N, len(space.levels))
    expected, deviation = (pd.Series(values, fitted.index) for values in model.left_out())
    trials = trials.assign(
        expected_nats=expected, expected_low=expected - deviation, expected_high=expected + deviation
    )
    known = dict(zip(trials["vector"], trials["loss_nats"], strict=True))
    return trials, pd.concat([_moves(base, known, model, space) for base in bases], ignore_index=True)


def _choices(vectors: Iterable[Vector], space: SearchSpace) -> Ints:
    return np.searchsorted(space.levels, list(vectors))


def _moves(base: str, known: Mapping[str, float], model: LossModel, space: SearchSpace) -> pd.DataFrame:
    """The rows of one base, given the ``known`` losses."""
    vector = parse_vector(base)
    ways = [(layer, g) for layer, allowed in enumerate(space.choices) for g in allowed if g != vector[layer]]
    moved = [(*vector[:layer], groups, *vector[layer + 1 :]) for layer, groups in ways]
    losses = np.array([known.get(format_vector(one), np.nan) for one in moved])
    estimated, choices = np.isnan(losses), _choices(moved, space)
    moves = pd.DataFrame(ways, columns=["layer", "groups"]).assign(
        base=base,
        change_nats=np.where(estimated, model.means(choices), losses) - known[base],
        deviation_nats=np.where(estimated, model.deviations(choices), 0.0),
        source=np.where(estimated, "estimated", "inherited"),
    )
    return moves[_MOVES]
