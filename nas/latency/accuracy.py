"""Predicted against measured: end-to-end models of vectors that the table has not seen."""

from collections import Counter
from contextlib import suppress

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from nas.errors import UserError
from nas.latency.points import Point
from nas.latency.predictor import Phase, Predictor
from nas.space import SearchSpace, Vector, format_vector, parse_vector

CHECK = "check.csv"
CHECK_COLUMNS = ["phase", "vector", "batch", "length", "measured_ms", "predicted_ms"]
WORKLOAD = ["phase", "batch", "length"]
_ENERGY_KEYS = ["groups", "batch", "length"]


def random_vectors(space: SearchSpace, count: int, seed: int) -> list[Vector]:
    """As many distinct vectors, each layer's choice drawn alike; fewer where the space has no more."""
    rng = np.random.default_rng([seed, 1])
    found: dict[Vector, None] = {}
    for _ in range(20 * count):
        if len(found) >= min(count, space.size):
            break
        found[tuple(int(rng.choice(allowed)) for allowed in space.choices)] = None
    return sorted(found)


def predict_end_to_end(measured_ms: dict[Point, float], predictor: Predictor) -> pd.DataFrame:
    """Sets the prediction beside each measured end-to-end model that has one: `CHECK_COLUMNS`."""
    rows = []
    for point, ms in sorted(measured_ms.items()):
        with suppress(UserError):  # an end-to-end model may fit where memory ended for some of the grid around it
            predicted_ms = predictor.forward_ms(point.phase, point.groups, point.batch, point.length)
            rows.append((point.phase, format_vector(point.groups), point.batch, point.length, ms, predicted_ms))
    return pd.DataFrame(rows, columns=CHECK_COLUMNS)


def summarise_check(check: pd.DataFrame) -> list[dict[str, float | str]]:
    """Per workload: how many models, mean and worst absolute relative error, and Kendall τ if there is one.

    Where there are more models than choices of groups, ``kendall_tau_refitted`` is that of layer times fitted to these
    very models: what it lacks to 1 is noise and the order of layers, which no sum can predict.
    """
    return [_summary(rows) for _, rows in check.groupby(WORKLOAD, sort=True)]


def lasting_load(
    energy: pd.DataFrame, table: pd.DataFrame, predictor: Predictor, layers: int
) -> list[dict[str, float]]:
    """How long decode steps that follow one another for seconds (``energy``) take, over their prediction.

    A GPU that reaches its power limit then is slower than in the short runs that a table is made of. Eager steps differ
    for another reason: they take as long as the host, which other processes share, needs to launch them. Only points of
    the table count, as between them the prediction has an error of its own.
    """
    layer_steps = table[(table["phase"] == "decode") & (table["part"] == "layer") & (table["n"] > 0)]
    measured = set(layer_steps[_ENERGY_KEYS].astype(int).itertuples(index=False, name=None))
    found = []
    for groups, batch, length, seconds, calls in energy[[*_ENERGY_KEYS, "seconds", "calls"]].to_numpy(float):
        if (groups, batch, length) not in measured:
            continue
        predicted = predictor.decode_ms((int(groups),) * layers, int(batch), int(length))
        where = {"groups": int(groups), "batch": int(batch), "length": int(length)}
        found.append(where | {"ratio": round(1e3 * seconds / calls / predicted, 4)})
    return found


def phase_errors(summaries: list[dict[str, float | str]], phase: Phase) -> tuple[float, float] | None:
    """Mean and worst error over all workloads of a phase."""
    of_phase = [summary for summary in summaries if summary["phase"] == phase]
    if not of_phase:
        return None
    models, means, worst = np.array([[summary[key] for key in ("n", "mape", "worst")] for summary in of_phase], float).T
    return float(np.average(means, weights=models)), float(worst.max())


def _summary(rows: pd.DataFrame) -> dict[str, float | str]:
    errors = (rows["predicted_ms"] / rows["measured_ms"] - 1).abs()
    summary: dict[str, float | str] = {"phase": str(rows["phase"].iloc[0])}
    summary |= {key: int(rows[key].iloc[0]) for key in WORKLOAD[1:]}
    summary |= {"n": len(rows), "mape": float(errors.mean()), "worst": float(errors.max())}
    taus = {"kendall_tau": _kendall_tau(rows["predicted_ms"], rows["measured_ms"])}
    counts = pd.DataFrame([Counter(parse_vector(vector)) for vector in rows["vector"]], rows.index).fillna(0)
    if len(rows) > counts.shape[1]:
        layer_ms, *_ = np.linalg.lstsq(counts, rows["measured_ms"])
        sums = (counts @ layer_ms).round(9)  # equal counts tie, whatever their last bit
        taus["kendall_tau_refitted"] = _kendall_tau(sums, rows["measured_ms"])
    return summary | {name: tau for name, tau in taus.items() if np.isfinite(tau)}  # none where predictions tie


def _kendall_tau(predicted_ms: pd.Series, measured_ms: pd.Series) -> float:
    return float(kendalltau(predicted_ms, measured_ms).statistic) if len(measured_ms) > 1 else np.nan
