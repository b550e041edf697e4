"""Can inherited losses be trusted to rank vectors? Which vectors to compare, and what their trained losses say.

The trainings happen in the stage. A *measurement* is one loss of one vector, a row with

    vector, total     the vector and its total of groups
    equal_total       whether it is of the set in which all have the same total
    kind              inherited | further (after more training) | alone (trained from the start without a supernet)
    seed, steps       of that training; empty for inherited losses
    loss_nats         validation loss
"""

import itertools
import warnings

import numpy as np
import numpy.typing as npt
import pandas as pd
from numpy.random import Generator
from scipy.stats import DegenerateDataWarning, bootstrap, kendalltau

from nas.errors import UserError
from nas.space import SearchSpace, Totals, Vector

Floats = npt.NDArray[np.float64]

MEASUREMENTS = ["vector", "total", "equal_total", "kind", "seed", "steps", "loss_nats"]
PREDICTORS = {"inherited": "inherited loss", "total": "total of groups"}
TRUTHS = {"further": "trained further", "alone": "trained alone"}
_RESAMPLES = 2000
_ATTEMPTS = 1000


def choose_vectors(space: SearchSpace, count: int, equal_total: int, seed: int) -> tuple[list[Vector], list[Vector]]:
    """Two sets of distinct vectors, ``count`` in all, ``equal_total`` of them in the second.

    The totals of the first set ascend from the smallest vector's to the largest's; the second has one total between.
    """
    totals, rng = Totals(space.choices), np.random.default_rng(seed)
    reachable: list[int] = totals.reachable.tolist()
    enough = [total for total in reachable if totals.counts[total] >= equal_total]
    if not enough or count > space.size:
        raise UserError(
            f"vectors is {count} and equal_total {equal_total}, but space {space.name} has {space.size} vectors, "
            f"at most {totals.counts.max():.0f} of one total; lower them"
        )
    middle = min(enough, key=lambda total: abs(2 * total - reachable[0] - reachable[-1]))
    places = np.linspace(0, len(reachable) - 1, count - equal_total).round().astype(int)
    equal = _distinct(totals, np.full(equal_total, middle), [], rng)
    return sorted(_distinct(totals, totals.reachable[places], equal, rng), key=sum), equal


def _distinct(totals: Totals, wanted: npt.NDArray[np.int64], taken: list[Vector], rng: Generator) -> list[Vector]:
    """As many vectors as ``wanted`` totals, none of them ``taken``; a second draw takes the place of a repetition."""
    chosen: dict[Vector, None] = {}
    for _ in range(_ATTEMPTS):
        chosen |= dict.fromkeys(vector for vector in totals.draw(wanted, rng) if vector not in taken)
        if len(chosen) >= len(wanted):
            return list(chosen)[: len(wanted)]
    raise UserError(f"could not draw {len(wanted)} different vectors; lower vectors or equal_total")


def choose_some(spread: list[Vector], equal: list[Vector], count: int) -> list[Vector]:
    """Of both sets of `choose_vectors`, ``count`` vectors, half of each where there are enough."""
    of_equal = max(min(count // 2, len(equal)), count - len(spread))
    places = np.linspace(0, len(spread) - 1, count - of_equal).round().astype(int)
    return [*(spread[place] for place in places), *equal[:of_equal]]


def agreement(measurements: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How well each predictor ranks vectors by each kind of trained loss; ``seed`` is the bootstrap's.

    Returns:
        Rows with ``truth, among`` (all | equal total, if there are such), ``predictor, vectors, tau`` (Kendall's τ-b),
        ``low, high`` (95 % by resampling vectors) and ``ceiling`` (see `noise_ceiling`).
    """
    rows = []
    by_kind = {kind: rows_of.set_index("vector") for kind, rows_of in measurements.groupby("kind")}
    inherited = by_kind["inherited"]
    for truth in (kind for kind in TRUTHS if kind in by_kind):
        losses = by_kind[truth].pivot_table("loss_nats", "vector", "seed")
        predicted = inherited.loc[losses.index]
        for among, chosen in (("all", slice(None)), ("equal total", predicted["equal_total"])):
            true = losses.loc[chosen].to_numpy()
            for predictor, values in (("inherited", predicted["loss_nats"]), ("total", -predicted["total"])):
                pair = values.loc[chosen].to_numpy(float), true.mean(axis=1)
                if len(true):
                    numbers = kendall(*pair), *bootstrap_interval(*pair, seed), noise_ceiling(true)
                    rows.append((truth, among, predictor, len(true), *numbers))
    return pd.DataFrame(rows, columns=["truth", "among", "predictor", "vectors", "tau", "low", "high", "ceiling"])


def kendall(predicted: Floats, true: Floats) -> float:
    """Kendall's τ-b; NaN where one side is constant."""
    return float(kendalltau(predicted, true).statistic) if len(true) > 1 else np.nan


def bootstrap_interval(predicted: Floats, true: Floats, seed: int) -> tuple[float, float]:
    """95 % percentile interval of `kendall` over resampled pairs; NaN where it is undefined."""
    if np.isnan(kendall(predicted, true)):
        return np.nan, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # constant resamples, which nanpercentile leaves out
        pairs = (predicted, true)
        resampled = bootstrap(pairs, kendall, n_resamples=_RESAMPLES, paired=True, method="percentile", rng=seed)
    low, high = np.nanpercentile(resampled.bootstrap_distribution, [2.5, 97.5])
    return float(low), float(high)


def noise_ceiling(losses_VS: Floats) -> float:
    """Kendall's τ between mean losses of V vectors in disjoint halves of the S seeds, averaged over all halvings.

    This is how well one measurement predicts another; a predictor that is compared with the mean over all seeds, which
    is less noisy than a half, can do better. NaN for a single seed.
    """
    if (seeds := losses_VS.shape[1]) == 1:
        return np.nan
    halves = map(list, itertools.combinations(range(seeds), seeds // 2))
    taus = [kendall(losses_VS[:, half].mean(1), np.delete(losses_VS, half, axis=1).mean(1)) for half in halves]
    return float(np.mean(taus))
