"""Predicted against measured: end-to-end models of vectors that the table has not seen."""

from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from nas.errors import UserError
from nas.latency.predictor import Point, Predictor
from nas.space import SearchSpace, Vector, format_vector

CHECK = "check.csv"
CHECK_COLUMNS = ["phase", "vector", "batch", "length", "measured_ms", "predicted_ms"]
WORKLOAD = ["phase", "batch", "length"]
_STEP = ["groups", "batch", "length"]


def random_vectors(space: SearchSpace, count: int, seed: int) -> list[Vector]:
    """As many distinct vectors, each layer's choice drawn alike; fewer where the space has no more."""
    rng, found = np.random.default_rng([seed, 1]), set[Vector]()
    while len(found) < min(count, space.size):
        found.add(tuple(int(rng.choice(allowed)) for allowed in space.choices))
    return sorted(found)


def predict_end_to_end(measured_ms: dict[Point, float], predictor: Predictor) -> pd.DataFrame:
    """Sets the prediction beside each measured end-to-end model that has one: `CHECK_COLUMNS`."""
    rows = []
    for point, ms in sorted(measured_ms.items()):
        with suppress(UserError):  # an end-to-end model may fit where memory ended for some of the grid around it
            predicted_ms = predictor.forward_ms(point.phase, point.groups, point.batch, point.length)
            rows.append((point.phase, format_vector(point.groups), point.batch, point.length, ms, predicted_ms))
    return pd.DataFrame(rows, columns=CHECK_COLUMNS)


def summarise_check(check: pd.DataFrame) -> list[dict[Any, float | str]]:
    """Per workload: how many models, mean and worst absolute relative error, and Kendall τ if there is one."""
    summaries = []
    for _, rows in check.groupby(WORKLOAD):
        predicted_ms, measured_ms = rows["predicted_ms"], rows["measured_ms"]
        errors = (predicted_ms / measured_ms - 1).abs()
        summary = rows[WORKLOAD].to_dict("records")[0]
        summary |= {"n": len(rows), "mape": errors.mean(), "worst": errors.max()}
        tau = kendalltau(predicted_ms, measured_ms).statistic if len(rows) > 1 else np.nan
        summaries.append(summary | ({"kendall_tau": tau} if np.isfinite(tau) else {}))  # none where predictions tie
    return summaries


def overall_errors(checks: list[dict[str, float | str]]) -> tuple[float, float]:
    """Mean and worst error over some workloads."""
    models, means, worst = np.array([[check[key] for key in ("n", "mape", "worst")] for check in checks], float).T
    return float(np.average(means, weights=models)), float(worst.max())


def lasting_load(
    energy: pd.DataFrame, table: pd.DataFrame, predictor: Predictor, layers: int
) -> list[dict[Any, float]]:
    """How many times as long decode steps that follow one another for seconds (``energy``) take as in short runs.

    A GPU at its power limit is slower then than in the short runs that a table is made of; eager steps take as long as
    the host needs to launch them. Only points of the table count: between them the prediction has an error of its own.
    """
    timed = table.query("phase == 'decode' and part == 'layer' and n > 0")[_STEP]
    steps = energy.merge(timed)
    vectors = [((groups,) * layers, batch, length) for groups, batch, length in steps[_STEP].itertuples(index=False)]
    predicted_ms = [predictor.forward_ms("decode", *at) for at in vectors]
    steps["ratio"] = (1e3 * steps["seconds"] / steps["calls"] / predicted_ms).round(4)
    return steps[[*_STEP, "ratio"]].to_dict("records")
