"""Can inherited losses be trusted to rank vectors? Which vectors to compare, and what their trained losses say.

The trainings happen in the stage. A *measurement* is one loss of one vector (``loss_nats``, of validation), whose
``kind`` is inherited, further (after more training) or alone (trained from the start without a supernet); ``seed`` and
``steps`` are that training's. ``equal_total`` marks the set of vectors in which all have the same total of groups.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from numpy.random import Generator
from scipy.stats import kendalltau, permutation_test

from nas.errors import UserError
from nas.space import SearchSpace, Totals, Vector

Floats = npt.NDArray[np.float64]

MEASUREMENTS = ["vector", "total", "equal_total", "kind", "seed", "steps", "loss_nats"]
PREDICTORS = {"inherited": "inherited loss", "total": "total of groups"}
TRUTHS = {"alone": "trained alone", "further": "trained further"}  # which starts from the inherited weights
AGREEMENT = ["truth", "among", "predictor", "vectors", "seeds", "tau", "low", "high"]
AGREEMENT += ["by_chance", "corrected", "p", "one_seed", "ceiling"]
TRAINED = ["vector", "loss_before_nats", "loss_after_nats", "rank_before", "rank_after"]
TRAINED += ["se_before_nats", "se_after_nats", "flips", "flips_beyond_noise"]
_UNKNOWN = (np.nan, np.nan, np.nan)
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


def agreement(measurements: pd.DataFrame) -> pd.DataFrame:
    """How well each predictor ranks vectors by each kind of trained loss; all resampling is seeded.

    Returns:
        Rows with ``truth, among`` (all | equal total, if there are such), ``predictor, vectors, seeds``; ``tau``,
        Kendall's τ-b with the mean loss over seeds, and ``low, high`` (see `bootstrap_interval`); ``by_chance,
        corrected, p`` of further training (see `beyond_chance`); and ``one_seed``, the mean τ with the losses of single
        seeds, with ``ceiling``, what the other seeds reach there.
    """
    rows = []
    by_kind = {kind: rows_of.set_index("vector") for kind, rows_of in measurements.groupby("kind")}
    for truth in (kind for kind in TRUTHS if kind in by_kind):
        losses = by_kind[truth].pivot_table("loss_nats", "vector", "seed")
        start = by_kind["inherited"].loc[losses.index]
        for among, chosen in (("all", slice(None)), ("equal total", start["equal_total"])):
            true_VS, before = losses.loc[chosen].to_numpy(), start.loc[chosen, "loss_nats"].to_numpy()
            if not len(before):
                continue
            mean, ceiling = true_VS.mean(axis=1), noise_ceiling(true_VS)
            for predictor, predicted in (("inherited", before), ("total", -start.loc[chosen, "total"].to_numpy(float))):
                interval = bootstrap_interval(predicted, true_VS, seed=0)
                changed = beyond_chance(predicted, before, mean, seed=0) if truth == "further" else _UNKNOWN
                one_seed = np.mean([kendall(predicted, true) for true in true_VS.T])
                numbers = kendall(predicted, mean), *interval, *changed, one_seed, ceiling
                rows.append((truth, among, predictor, *true_VS.shape, *numbers))
    return pd.DataFrame(rows, columns=AGREEMENT)


def kendall(predicted: Floats, true: Floats) -> float:
    """Kendall's τ-b; NaN where one side is constant."""
    return float(kendalltau(predicted, true).statistic) if len(true) > 1 else np.nan


def compare_trained(vectors: Sequence[str], before_VN: Floats, after_VN: Floats) -> pd.DataFrame:
    """What a training did to the order of V vectors, by their losses on the same N windows.

    Returns:
        Rows with the columns `TRAINED`, lowest loss before first. Ranks begin at 1. Standard errors are those of the
        difference to the first row's loss. ``flips`` counts the other vectors with which one changed its order, and
        ``flips_beyond_noise`` those from which it differs by more than two standard errors both before and after.
    """
    order = np.argsort(before_VN.mean(axis=1), kind="stable")
    table = pd.DataFrame({"vector": [vectors[at] for at in order]})
    signs, clear = [], []
    for when, losses_VN in (("before", before_VN[order]), ("after", after_VN[order])):
        means, covariance = losses_VN.mean(axis=1), np.atleast_2d(np.cov(losses_VN, ddof=0))
        variances = np.diag(covariance)
        with np.errstate(invalid="ignore"):  # a single window tells no error
            errors = np.sqrt((variances[:, None] + variances - 2 * covariance).clip(0) / (losses_VN.shape[1] - 1))
        differences = means[:, None] - means
        signs.append(np.sign(differences))
        clear.append(abs(differences) > 2 * errors)
        ranks = pd.Series(means).rank(method="min").astype(int)
        table = table.assign(**{f"loss_{when}_nats": means, f"rank_{when}": ranks, f"se_{when}_nats": errors[:, 0]})
    flipped = signs[0] * signs[1] < 0
    table["flips"], table["flips_beyond_noise"] = flipped.sum(axis=1), (flipped & clear[0] & clear[1]).sum(axis=1)
    return table[TRAINED]


def order_sentence(trained: pd.DataFrame) -> str:
    """How far the order of `compare_trained` changed."""
    if len(trained) == 1:
        return "A single vector has no order that could change"
    count, (flips, clear) = len(trained), trained[["flips", "flips_beyond_noise"]].sum().astype(int) // 2
    tau = kendall(trained["loss_before_nats"].to_numpy(), trained["loss_after_nats"].to_numpy())
    return (
        f"Kendall's τ of inherited and trained losses is {tau:.2f}: {flips} of {count * (count - 1) // 2} pairs of "
        f"vectors changed their order, {clear} of them by more than two standard errors before and after; the training "
        "began with the inherited weights"
    )


def bootstrap_interval(predicted: Floats, losses_VS: Floats, seed: int) -> tuple[float, float]:
    """95 % of `kendall` with the mean loss over seeds, both vectors and seeds drawn anew; NaN where it is undefined."""
    if np.isnan(kendall(predicted, losses_VS.mean(axis=1))):
        return np.nan, np.nan
    rng, (vectors, seeds) = np.random.default_rng(seed), losses_VS.shape
    taus = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(vectors, size=vectors)
        taus.append(kendall(predicted[drawn], losses_VS[drawn][:, rng.integers(seeds, size=seeds)].mean(axis=1)))
    low, high = np.nanpercentile(taus, [2.5, 97.5])  # without constant samples
    return float(low), float(high)


def beyond_chance(predicted: Floats, before: Floats, after: Floats, seed: int) -> tuple[float, float, float]:
    """What of `kendall` with losses after a training is more than the losses before it, which are in them, explain.

    Returns:
        The mean τ₀ if the changes were dealt to the vectors at random; τ corrected for it, (τ - τ₀) / (1 - τ₀): 0 where
        changes agree as dealt at random, NaN where they are constant; the share p of deals that reach τ.
    """
    if np.isnan(tau := kendall(predicted, after)):
        return _UNKNOWN

    def agree(changes: Floats) -> float:
        return kendall(predicted, before + changes)

    dealt = permutation_test(
        (after - before,), agree, permutation_type="pairings", alternative="greater", n_resamples=_RESAMPLES, rng=seed
    )
    chance = float(np.mean(dealt.null_distribution))
    return chance, (tau - chance) / (1 - chance) if chance < 1 - 1e-9 else np.nan, float(dealt.pvalue)


def noise_ceiling(losses_VS: Floats) -> float:
    """Mean `kendall` of each seed's losses with the mean of the other seeds'; NaN for a single seed.

    A predictor that is held against single seeds and exceeds this knows more than the other trainings do.
    """
    if (seeds := losses_VS.shape[1]) == 1:
        return np.nan
    others = [np.delete(losses_VS, seed, axis=1).mean(axis=1) for seed in range(seeds)]
    return float(np.mean([kendall(*pair) for pair in zip(others, losses_VS.T, strict=True)]))
