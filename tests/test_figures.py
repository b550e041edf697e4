"""The figures that README and docs quote are those of the CSVs beside them."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nas import ranking
from nas.files import read_json

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RUNTIMES = ("compiled", "eager")
KINDS = ("inherited", "further")
RULES = ("sliced", "pooled", "separate")
RATES = (("high", "2e-3"), ("low", "5e-4"))


def page(name: str) -> str:
    """The text of a page, with single spaces."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


@pytest.fixture
def script(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A script's functions."""
    return runpy.run_path(str(ROOT / "scripts" / request.param))


@pytest.mark.parametrize("script", ["bench_search.py"], indirect=True)
def test_the_search_benchmark_is_quoted_as_measured(script: dict[str, Any]) -> None:
    table = script["ordered"](pd.read_csv(DOCS / "search" / "bench.csv"))
    assert script["short_table"](table) in (DOCS / "search.md").read_text(encoding="utf-8")
    assert script["full_table"](table) in (DOCS / "search" / "table.md").read_text(encoding="utf-8")

    medians = 100 * table.groupby(["problem", "evaluations", "sampler"])["share"].median()
    noisy = medians["noisy", 50]
    assert f"Optuna's Gaussian process has {noisy['gp']:.1f} % (one seed) and `front` {noisy['front']:.1f} %" in page(
        "README.md"
    )
    links = [medians[name, 100] for name in ("additive", "saturating", "exploding", "signed")]
    baseline, front = ([one[sampler] for one in links] for sampler in ("one-at-a-time", "front"))
    adjacent, distant = (medians[name, 500] for name in ("adjacent", "distant"))
    assert (
        f"{min(baseline):.1f} to {max(baseline):.1f} % of the sums behind monotone functions after 100 evaluations "
        f"(`front` {min(front):.1f} to {max(front):.1f} %), but {adjacent['one-at-a-time']:.1f} % with coupled layers "
        f"after 500 (`front` {distant['front']:.1f} to {adjacent['front']:.0f} %)"
    ) in page("README.md")


def test_the_search_is_within_its_quartiles_of_the_best_but_for_the_case_that_is_named() -> None:
    table = pd.read_csv(DOCS / "search" / "bench.csv")
    behind = []
    for place, rows in table.groupby(["problem", "evaluations"]):
        others = rows[rows["sampler"] != "front"].groupby("sampler")["share"].median()
        if rows.loc[rows["sampler"] == "front", "share"].quantile(0.75) < others.max() - 1e-9:
            behind.append(place)
    assert behind == [("noisy", 50)]


@pytest.mark.parametrize("script", ["headline.py"], indirect=True)
def test_the_headline_is_quoted_as_measured(script: dict[str, Any]) -> None:
    rows = pd.read_csv(DOCS / "headline" / "headline.csv")
    vllm = script["served_by_vllm"](rows["device"].iloc[0])
    assert script["beside_the_announcement"](rows, vllm) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["table"](rows, vllm) in (DOCS / "latency.md").read_text(encoding="utf-8")
    errors = script["predicted"](rows)
    pd.testing.assert_frame_equal(errors, pd.read_csv(DOCS / "headline" / "predicted.csv"))
    compiled, eager = (100 * errors.loc[errors["runtime"] == name, "relative_error"].abs() for name in RUNTIMES)
    assert (
        f"headline.csv above by {compiled.mean():.1f} % and {compiled.max():.1f} %, mean and worst. The eager tables "
        f"miss those by {eager.mean():.0f} % and {eager.max():.0f} %"
    ) in page("README.md")
    assert f"{compiled.mean():.1f} % off in the mean and {compiled.max():.1f} % at worst" in page("docs/latency.md")


@pytest.mark.parametrize("script", ["lasting_check.py"], indirect=True)
def test_lasting_steps_are_quoted_as_measured(script: dict[str, Any]) -> None:
    found = script["errors"](script["beside_predictions"](pd.read_csv(DOCS / "latency" / "lasting.csv")))
    pd.testing.assert_frame_equal(found, pd.read_csv(DOCS / "latency" / "lasting_errors.csv"))
    assert script["markdown"](found) in (DOCS / "latency.md").read_text(encoding="utf-8")
    decode = found[(found["phase"] == "decode") & (found["vectors"] == 12)]
    earlier = 100 * found[found["date"] == found["date"].min()][["mean", "worst"]]
    worst = {}
    for hour in ("14:07", "21:15", "17:34"):
        own = 100 * decode.loc[decode["date"].str[11:16] == hour, ["mean", "worst", "short_mean"]]
        worst[hour] = own["worst"].max()
        if hour != "17:34":
            over_all = f"takes the mean error from {own['short_mean'].mean():.2f} to {own['mean'].mean():.2f} %"
            assert over_all in page("docs/latency.md")
    assert f"mean and {earlier['worst'].max():.1f} % at worst" in page("docs/latency.md")
    uniform = 100 * decode[decode["date"].str[11:16] == "17:34"].set_index("batch")["uniform_worst"]
    assert f"(uniform: {uniform[80]:.2f} and {uniform[112]:.2f} %)" in page("docs/latency.md")
    one, another, h200 = worst.values()
    quoted = f"{one:.1f} % at worst on an H100, {another:.1f} % on another and {h200:.1f} % on an H200"
    assert quoted in page("README.md")


@pytest.mark.parametrize(
    ("script", "function", "table", "text"),
    [
        ("bench_search.py", "stops_table", "search/auto.csv", "search.md"),
        ("engines_check.py", "table", "engines.csv", "engines.md"),
        ("bench_kv_training.py", "markdown", "benchmarks/kv_training.csv", "checkpoints.md"),
    ],
    indirect=["script"],
)
def test_tables_are_those_of_their_csvs(script: dict[str, Any], function: str, table: str, text: str) -> None:
    assert script[function](pd.read_csv(DOCS / table)).strip() in (DOCS / text).read_text(encoding="utf-8")


def test_what_engines_compute_of_exports_is_quoted_as_measured() -> None:
    table, text = pd.read_csv(DOCS / "engines.csv"), page("docs/engines.md")
    assert not table["commit"].str.endswith("-dirty").any()
    engines = {name: rows.set_index("model") for name, rows in table.groupby("engine")}
    flash, plain = (engines[f"llama.cpp{how}"].drop("q/k norms") for how in ("", " without flash attention"))
    equal, prompts = flash["prompts_equal"].str.split(" of ", expand=True).astype(int).sum()
    assert f"of {prompts} prompts {equal} have the same greedy tokens (the others part at near-ties)" in text
    errors, exact = (rows["max_log_probability_error"] for rows in (flash, plain))
    assert (flash["margin_where_tokens_differ"].fillna(0) < 2 * errors).all()
    assert f"by up to {errors['demo']:.1g} for `demo` and {errors.drop('demo').max():.2f} for the random models" in text
    assert (plain["prompts_equal"] == "8 of 8").all()
    most, llama3, yarn = (f"{error:.1e}" for error in (exact.max(), exact["llama3 rope"], exact["yarn rope"]))
    agreement = f"all tokens are the same and log-probabilities agree to {most} (llama3 {llama3}, yarn {yarn})"
    assert agreement.replace("e-0", "e-") in text


def test_the_demos_latency_check_is_quoted_as_measured() -> None:
    check = pd.read_csv(DOCS / "demo" / "latency_check.csv")
    errors = 100 * (check["predicted_ms"] / check["measured_ms"] - 1).abs()
    low, high = sorted(errors.groupby(check["phase"]).mean())
    assert f"{low:.0f} to {high:.0f} % in the mean and {errors.max():.0f} % at worst)" in page("docs/latency.md")


def test_training_the_heads_of_a_large_model_is_quoted_as_measured() -> None:
    seconds = pd.read_csv(DOCS / "benchmarks" / "kv_training.csv").set_index("kind")["seconds"]
    plain = [seconds["forward"] + seconds[name] for name in ("forward and backward", "backward")]
    needed, alone = (seconds["kv step"] / both for both in plain)
    text = page("docs/checkpoints.md")
    assert f"It takes {needed:.2f} times as long as the plain passes" in text
    assert f"forward and backward); {alone:.2f} times forward and backward alone" in text


def test_how_the_page_opens_is_quoted_as_measured() -> None:
    for row in pd.read_csv(DOCS / "report" / "opening.csv").to_dict("records"):
        line = f"| {row['vectors']:,} | {row['bytes'] / 1e6:.2f} | {row['open_s']:.2f} | {row['select_s']:.2f} |"
        assert line in page("docs/report.md")


def test_the_trials_of_memory_are_quoted_as_measured() -> None:
    trials = pd.read_csv(DOCS / "memory" / "batch_max.csv")
    assert trials["fits"].all()
    h100, h200 = (trials[trials["device"].str.contains(card)] for card in ("H100", "H200"))
    text = page("docs/latency.md")
    assert f"fitted in all {len(h100)} trials and was at most {100 * h100['left_unused'].max():.1f} %" in text
    assert (h100["largest"] - h100["predicted"]).max() == 1
    unused = 100 * h200["left_unused"]
    assert f"All {len(h200)} fitted, with {unused.min():.1f} to {unused.max():.1f} % of the largest batch" in text


@pytest.mark.parametrize("script", ["vllm_check.py"], indirect=True)
def test_vllm_is_quoted_as_measured(script: dict[str, Any]) -> None:
    rows = script["beside_predictions"](pd.read_csv(DOCS / "vllm" / "served.csv"))
    pd.testing.assert_frame_equal(rows, pd.read_csv(DOCS / "vllm" / "check.csv"))
    of = rows.set_index(["device", "model"])["vllm_over_ours"]
    ratios = of["NVIDIA H100 80GB HBM3"][["Llama-2-7B", "DeciLM-6B"]]
    assert f"take {ratios.iloc[0]:.2f} and {ratios.iloc[1]:.2f} times as long" in page("docs/latency.md")
    (tau,) = script["rankings"](rows).to_dict("records")
    card, text = tau["device"], page("docs/latency.md")
    assert (card, tau["vectors"]) == ("NVIDIA H200", 11)
    assert f"take {of[card].min():.2f} to {of[card].max():.2f} times as long" in text
    assert (
        f"largest batch, is {tau['throughput']:.3f}; with Llama 2 7B, of twelve models, {tau['with_llama']:.3f}."
        in text
    )
    assert f"alone has the same τ of {tau['total']:.3f}" in text
    assert f"which differ by vector, τ is {tau['step']:.3f}" in text
    h100 = rows[rows["device"].str.contains("H100")].set_index("model")
    shares = (h100["vllm_tokens_per_s"] / h100["our_tokens_per_s"]).dropna().round(2)
    assert f"{shares['Llama-2-7B']} (Llama) and {shares['DeciLM-6B']} times as many tokens" in page("README.md")


@pytest.mark.parametrize("script", ["smollm2.py"], indirect=True)
def test_smollm2_is_quoted_as_measured(script: dict[str, Any]) -> None:
    losses, text = pd.read_csv(DOCS / "smollm2" / "perplexity.csv"), page("docs/smollm2.md")
    assert script["markdown"](losses) in (DOCS / "smollm2.md").read_text(encoding="utf-8")
    trained = losses[losses["state"] == "trained"]
    third = trained[trained["share"] == "2/3"].set_index("kind")["over_checkpoint"] * 100
    random = third["random"]
    assert len(random) == 20 and random.min() > third["chosen"]
    chosen = f"the searched vector has {third['chosen']:.1f} % more, the best of 20 random ones {random.min():.1f} %"
    assert f"{chosen}, the mean of them {random.mean():.1f} %" in text
    tuned = losses[losses["state"] == "finetuned"].set_index("kind")
    checkpoint, tuned = tuned.loc["largest"], tuned[tuned["share"] == "2/3"]
    itself, chosen, best = (100 * value for value in (checkpoint["over_checkpoint"], *tuned["over_checkpoint"]))
    also = 100 * (tuned["perplexity"]["chosen"] / checkpoint["perplexity"] - 1)
    assert f"Finetuned, it is {-chosen:.1f} % below the checkpoint, and the best random one {best:.1f} % above" in text
    drift = f"drifts by {itself:.1f} %".replace("-", "−")
    assert f"{drift} in those {checkpoint['finetune_steps']} steps" in text
    assert f"The searched vector is {also:.1f} % above that" in text
    readme = page("README.md")
    random_in_readme = f"the best of 20 random ones {random.min():.1f} %"
    assert f"{third['chosen']:.1f} % more perplexity than the checkpoint, {random_in_readme}" in readme
    assert f"checkpoint's logits {chosen:.1f} % and {best:.1f} %".replace("-", "−") in readme
    front = trained[trained["kind"] == "front"]
    enough = front.loc[front["over_checkpoint"] <= 0.02, "kv_share"].min()
    assert f"2 % are reached at {100 * enough:.0f} % of the KV bytes" in text
    better = front[front["over_checkpoint"] < 0]
    below, share = -100 * better["over_checkpoint"].min(), 100 * better["kv_share"].min()
    assert f"by up to {below:.1f} % down to {share:.0f} % of the KV bytes" in text


def test_vllm_on_a_gpu_is_quoted_as_measured() -> None:
    table, text = pd.read_csv(DOCS / "engines_gpu.csv"), page("docs/engines.md")
    alike = table["prompts_equal"].str.split().str[0].astype(int).groupby([table["engine"], table["dtype"]]).sum()
    assert alike["vllm", "float32"] == alike["transformers", "float32"] == 24
    assert (
        f"{alike['vllm', 'bfloat16']} of 24 prompts have them (in transformers {alike['transformers', 'bfloat16']})"
        in text
    )
    errors = table.set_index(["engine", "dtype", "model"])["max_log_probability_error"].sort_index()
    assert errors["vllm", "float32"].max() < 3e-6
    assert f"a log-probability of the mixed vector is off by {errors['vllm', 'bfloat16', 'mixed']:.1f}" in text
    of_uniform = errors["vllm", "bfloat16"].drop("mixed").max()
    assert f"within {of_uniform:.3f} (in transformers {errors['transformers', 'bfloat16'].max():.3f})" in text
    served = table[table["engine"] == "vllm"].set_index(["dtype", "model"])
    assert (served["kv_cache"].str.split().str[-1] == served["kv_cache_of_vector"].astype(str)).all()
    mixed, four = (int(served["kv_cache_of_vector"]["float32", name]) for name in ("mixed", "uniform-4"))
    assert f"{mixed:,} tokens for the mixed vector, {mixed / four:.2f} times as many as for uniform 4" in text


def test_decilms_problem_is_quoted_as_measured() -> None:
    text, readme = page("docs/decilm.md"), page("README.md")
    orders = pd.read_csv(DOCS / "decilm" / "equal_cost.csv")
    by_kind = orders.drop_duplicates("kind").set_index("kind")
    best, fastest, theirs = (by_kind.loc[kind] for kind in ("best order", "fastest at its loss", "DeciLM-6B"))
    random = orders.loc[orders["kind"] == "random order", "difference_nats"]

    def with_error(row: Any, windows: str = "") -> str:
        difference = f"{row[f'{windows}difference_nats']:+.4f}".replace("-", "−")
        return f"{difference} ± {row[f'{windows}difference_se_nats']:.4f}"

    for name, row in (("reversed", by_kind.loc["reversed"]), ("best order found", best)):
        assert f"| {name} | {with_error(row)} | {with_error(row, 'held_out_')} |" in text
    low, median = (f"{number:.4f}".replace("-", "−") for number in (random.min(), random.median()))
    assert f"| {len(random)} random orders, median (best) | {median} ({low}) |" in text
    assert f"{(random < 0).sum()} of {len(random)} random orders are better" in text
    assert f"one of {orders['kind'].isin(['searched order', 'best order']).sum()} that a model" in text
    held_out = f"{-best['held_out_difference_nats']:.4f} ± {best['held_out_difference_se_nats']:.4f} nats below"
    assert f"has a loss {held_out} DeciLM-6B's" in readme
    assert all(best[cost] == theirs[cost] for cost in ("decode_ms", "tokens_per_s", "batch"))
    assert f"{theirs['batch']} sequences in 22.5 GiB, {theirs['decode_ms']:.2f} ms per step" in text

    found = {name: pd.read_csv(DOCS / "decilm" / f"search_{name}.csv") for name in ("h200", "h100", "a10g")}
    trials = found["h200"]
    better = theirs["loss_nats"] - trials.set_index("name")["loss_nats"]
    speeds = trials.set_index("name")["tokens_per_s"]
    of_order = theirs["loss_nats"] - best["loss_nats"]
    assert f"uniform 4 is {better['uniform 4']:.4f} nats better than DeciLM-6B" in text
    assert f"the best order {of_order:.4f}, three fifths" in text and 0.55 < of_order / better["uniform 4"] < 0.65
    slower = speeds["uniform 2"] / theirs["tokens_per_s"]
    assert f"is {better['uniform 2']:.4f} nats better at {slower:.2f} times DeciLM-6B's throughput" in text
    assert f"By inherited loss, two groups everywhere are as much better at {slower:.2f} times the speed" in readme
    as_fast = trials[trials["tokens_per_s"] >= theirs["tokens_per_s"]]["loss_nats"].min()
    assert f"another mix of groups, as fast, is {theirs['loss_nats'] - as_fast:.4f} nats better" in text
    span = better["uniform 4"] - better["uniform 1"]
    assert f"one to four groups everywhere span {span:.4f}" in readme

    def fastest_over(table: pd.DataFrame, name: str) -> float:
        row = table[table["name"] == name].iloc[0]
        speed: float = table.loc[table["loss_nats"] <= row["loss_nats"], "tokens_per_s"].max() / row["tokens_per_s"]
        return speed

    h200, h100, a10g = (f"{fastest_over(table, 'DeciLM-6B'):.2f}" for table in found.values())
    assert f"({with_error(fastest, 'held_out_')} on the other windows)" in text
    shown = f"{fastest['tokens_per_s']:,.0f} tokens/s: {h200} times as many ({h100} times on the H100, {a10g} by the"
    assert shown in text and f"this vector has {fastest['batch']}" in text
    four, two, one = (f"{fastest_over(trials, f'uniform {groups}'):.2f}" for groups in (4, 2, 1))
    assert one == "1.00" and f"{four} times as fast as uniform 4, {two} times as fast as uniform 2" in text
    supernet = pd.read_csv(DOCS / "decilm" / "supernets.csv").set_index("supernet").loc["main"]
    assert f"| supernet | {supernet['tokens']:,} tokens ({supernet['steps']:,} steps" in text


def test_the_agreement_of_supernets_is_quoted_as_measured() -> None:
    text, table = page("docs/decilm.md"), pd.read_csv(DOCS / "decilm" / "tau.csv")
    agreement = {(row["kind"], row["first"], row["second"]): row for row in table.to_dict("records")}
    for pair in [pair for kind, *pair in agreement if kind == "layer"]:
        rows = [agreement[kind, *pair] for kind in ("layer", "order", "drawn")]
        cells = [f"{signed(row['tau'])} ({interval(row)})" for row in rows]
        assert f"| {' and '.join(pair)} | {' | '.join(cells)} |" in text
    totals = table.loc[table["kind"] == "drawn", "tau_of_totals"]
    assert f"has a τ of {totals.min():.2f} to {totals.max():.2f} with the last" in text
    ahead = {row["second"]: row["tau"] - row["tau_of_totals"] for row in agreement.values() if row["first"] == "main"}
    assert ahead["half"] > 0.05 and ahead["double"] < 0
    narrow = agreement["order", "main", "narrow"]
    shown = f"ranks {narrow['vectors']} orders of these groups otherwise (τ {narrow['tau']:.2f}, {interval(narrow)})"
    assert shown in page("README.md")
    losses = pd.read_csv(DOCS / "decilm" / "transfer.csv")
    layers = losses[losses["kind"] == "layer"].pivot_table("loss_nats", "vector", "supernet")
    layers -= losses[losses["kind"] == "largest"].set_index("supernet")["loss_nats"]
    layers.index = layers.index.map(lambda vector: vector.split("-").index("1"))
    assert layers.loc[:3].to_numpy().max() < 1e-4 and "the first four layers lose at most 0.0001 nats" in text
    assert all(set(layers[name].nlargest(2).index) == {17, 19} for name in ("main", "half"))
    assert "17 and 19 lose most in *main* and in *half*, but 25 in *double*" in text and layers["double"].idxmax() == 25
    assert "in *narrow* it is 21" in text and layers["narrow"].idxmax() == 21 and layers["narrow"][17] < 1e-4
    later = layers.loc[6:]
    taus = [ranking.kendall(later[name].to_numpy(), later["narrow"].to_numpy()) for name in ("main", "double")]
    assert f"without those τ is {taus[0]:.2f} with *main* and {taus[1]:.2f} with *double*" in text
    double = losses[losses["supernet"] == "double"].set_index("kind")
    best, theirs, orders = (double["loss_nats"][kind] for kind in ("best order", "DeciLM-6B", "order"))
    assert f"There it is {theirs - best:.4f} nats better than DeciLM-6B's" in text
    assert f"than all 30 random orders, by {orders.min() - best:.4f} than the best of those" in text
    assert len(orders) == 30 and f"is worse than {(orders < theirs).sum()} of them" in text


def test_the_vectors_trained_alone_are_quoted_as_measured() -> None:
    text, readme = page("docs/decilm.md"), page("README.md")
    losses, [at] = pd.read_csv(DOCS / "decilm" / "alone.csv"), records("decilm/alone.csv", ["steps", "batch", "length"])
    assert "{:,} steps of {} × {:,}".format(*at) in text and f"{np.prod(at) / 1e6:.0f} million tokens" in text
    by_seed = losses.pivot_table("loss_nats", "seed", "name")
    differences = by_seed.sub(by_seed["DeciLM-6B"], axis="index")
    rows = records("decilm/alone_differences.csv", ["name"])
    for name, shown in {"ours": "best order of its groups", "uniform 2": "uniform 2", "uniform 1": "uniform 1"}.items():
        row = rows[(name,)]
        mean, low, high = (signed(row[column], 4) for column in ("difference_nats", "low_nats", "high_nats"))
        assert row["seeds"] == len(by_seed) == 4 and row["difference_nats"] == pytest.approx(differences[name].mean())
        assert f"| {shown} | {mean} ({low} to {high}) | {row['p']:.2f} |" in text
        if name == "ours":
            assert f"{mean} nats beside DeciLM-6B's, with a 95 % interval from {low} to {high}" in readme
    ours, uniform = differences["ours"].to_numpy(), differences["uniform 1"]
    assert "better by one seed and worse by three" in text and (ours < 0).tolist() == [False, False, True, False]
    assert f"worse by all four seeds, by {uniform.min():.3f} to {uniform.max():.3f}" in text
    *others, jump = sorted(by_seed["uniform 2"])
    assert f"ends at {jump:.3f}, the others at {min(others):.3f} to {max(others):.3f}" in text
    together = by_seed.corr()["DeciLM-6B"].drop("DeciLM-6B")
    assert f"correlations {signed(together.max())} to {signed(together.min())}" in text

    deviation, effect = float(np.std(ours, ddof=1)), 0.0039
    low, high = deviation * np.sqrt(3 / stats.chi2.ppf([0.975, 0.025], 3))
    needed = [seeds_needed(effect, each) for each in (deviation, low, high)]
    assert (
        f"deviates by {deviation:.4f} nats between seeds, so {needed[0]} seeds would find an effect of 0.0039" in text
    )
    assert f"between {low:.4f} and {high:.3f}, and so the number needed between {needed[1]} and {needed[2]}" in text


def seeds_needed(effect: float, deviation: float) -> int:
    """The fewest with which a two-sided paired t-test at 5 % finds an effect four times in five."""

    def power(seeds: int) -> float:
        least = stats.t.ppf(0.975, seeds - 1)
        return float(stats.nct.sf(least, seeds - 1, effect * seeds**0.5 / deviation))

    return next(seeds for seeds in range(2, 1000) if power(seeds) >= 0.8)


def test_the_samplers_model_on_a_trained_supernet_is_quoted_as_measured() -> None:
    table, text = pd.read_csv(DOCS / "decilm" / "predicted.csv"), page("docs/decilm.md")
    for (model, told), rows in table.groupby(["model", "told"]):
        cells = [f"{row['tau']:.2f} ({interval(row)})" for _, row in rows.iterrows()]
        cells += [", ".join(f"{error:.5f}" for error in rows["rms_error_nats"])]
        shares = rows["within_two_deviations"].dropna()
        cells += [", ".join(f"{100 * share:.0f} %" for share in shares) or "–"]
        assert f"| {told}{', the plain sum' if model == 'sum' else ''} | {' | '.join(cells)} |" in text
    of_sampler, plain = table[table["model"] == "sampler"], table[table["model"] == "sum"].iloc[0]
    orders, others = (of_sampler[of_sampler["of"] == kind] for kind in ("orders", "other totals"))
    deviations = orders["deviation_nats"].iloc[0], others["deviation_nats"].iloc[0]
    assert f"own standard deviations are {deviations[0]:.5f} and {deviations[1]:.4f} nats" in text
    assert f"has a τ of {others['tau_of_totals'].iloc[0]:.2f} with the other totals" in text
    losses = pd.read_csv(DOCS / "decilm" / "transfer.csv").query("supernet == 'main'").set_index("kind")["loss_nats"]
    search = pd.read_csv(DOCS / "decilm" / "search_h200.csv").set_index("name")["loss_nats"]
    sums = (losses["layer"] - losses["largest"]).sum(), search["uniform 1"] - search["uniform 4"]
    assert f"its penalties add up to {sums[0]:.4f} where uniform 1 loses {sums[1]:.4f}" in text
    hundred = orders[orders["told"] == 100].iloc[0]
    ranked = f"ranks {hundred['vectors']} unseen vectors of one total with τ {hundred['tau']:.2f} ({interval(hundred)}"
    assert ranked in page("README.md") and f"alone, τ {plain['tau']:.2f} ({interval(plain)})" in page("README.md")


def test_the_speed_of_evaluation_is_quoted_as_measured() -> None:
    table, text = pd.read_csv(DOCS / "benchmarks" / "evaluation.csv"), page("docs/decilm.md")
    on_gpu = table[(table["space"] == "decilm-proxy") & (table["device"] == "NVIDIA H200")]
    speed, errors = on_gpu.dropna(subset="plain_tokens_per_s").iloc[-1], on_gpu.dropna(subset="compared").iloc[-1]
    rates = [speed["tokens_per_s"] / 1e6, speed["plain_tokens_per_s"] / 1e6]
    assert f"{rates[0]:.2f} against {rates[1]:.2f} million tokens/s, {rates[0] / rates[1]:.2f} times as many" in text
    assert f"161 vectors of 262,144 tokens take {speed['seconds_one_by_one']:.1f} s one by one" in text
    shown = f"{errors['fp16_difference_nats']:.1e}".replace("e-0", "e-")
    assert f"was {shown} nats over {errors['tokens']:,.0f} tokens" in text


def records(name: str, keys: list[str]) -> dict[Any, dict[str, Any]]:
    """The rows of a CSV under docs, by the values of some columns."""
    return {tuple(row[key] for key in keys): dict(row) for _, row in pd.read_csv(DOCS / name).iterrows()}


def signed(number: float, decimals: int = 2) -> str:
    """The number with a minus sign."""
    return f"{number:.{decimals}f}".replace("-", "−")


def interval(row: Any) -> str:
    """Its bounds, as pages quote them."""
    return f"{signed(row['low'])} to {signed(row['high'])}"


@pytest.fixture(scope="module")
def agreements() -> dict[Any, dict[str, Any]]:
    """The rows of the fidelity study by setting (high or low), rule, kind of training, set of vectors and predictor."""
    rows = records("fidelity/agreement.csv", ["setting", "truth", "among", "predictor"])
    settings = {f"{rule}, learning rate {rate}": (name, rule) for rule in RULES for name, rate in RATES}
    return {(*settings[setting], *others): row for (setting, *others), row in rows.items()}


def test_the_agreements_are_those_of_the_measured_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_RESAMPLES", 2)  # intervals and what is dealt at random are not compared
    written = pd.read_csv(DOCS / "fidelity" / "agreement.csv").set_index("setting")
    for rule, name, rate in [(rule, rule, "2e-3") for rule in RULES] + [("sliced", "low_sliced", "5e-4")]:
        anew = ranking.agreement(pd.read_csv(DOCS / "fidelity" / f"{name}.csv"))
        same = anew.columns.difference(["low", "high", "by_chance", "corrected", "p"], sort=False)
        rows = written.loc[[f"{rule}, learning rate {rate}"]][same].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, anew[same])


def test_models_trained_alone_are_quoted_as_measured(agreements: dict[Any, dict[str, Any]]) -> None:
    cells = [("low", "sliced", "inherited"), ("low", "pooled", "inherited"), ("low", "sliced", "total")]
    cells += [("high", "sliced", "inherited"), ("high", "sliced", "total")]
    low, pooled, total, *_ = rows = [agreements[place, rule, "alone", "all", by] for place, rule, by in cells]
    text, readme = page("docs/fidelity.md"), page("README.md")
    for name, shown in (
        ("τ with the mean of three seeds", [f"{signed(row['tau'])} ({interval(row)})" for row in rows]),
        ("with single seeds", [signed(row["one_seed"]) for row in rows]),
        ("noise ceiling", [signed(row["ceiling"]) for row in rows]),
    ):
        assert f"| {name} | {' | '.join(shown)} |" in text
    assert {(row["vectors"], row["seeds"]) for row in rows} == {(8, 3)}
    assert (
        f"was {low['tau']:.2f} (`sliced`; 95 % interval over vectors and seeds {interval(low)}) at a learning rate of "
        f"5e-4, that of the total of groups {total['tau']:.2f}"
    ) in readme
    assert (
        f"({low['tau']:.2f} against {total['tau']:.2f}, against single seeds {low['one_seed']:.2f} against "
        f"{total['one_seed']:.2f})"
    ) in text
    assert abs(low["tau"] - pooled["tau"]) < 0.1  # "about as well"
    for name, decimals, apart in (("sliced", 2, "nats apart"), ("low_sliced", 3, "apart")):
        measured = pd.read_csv(DOCS / "fidelity" / f"{name}.csv").query("kind == 'alone'")
        ranges = measured.groupby("vector")["loss_nats"].agg(lambda losses: losses.max() - losses.min())
        assert f"{ranges.min():.{decimals}f} to {ranges.max():.2f} {apart}" in text
    means = measured.groupby("vector")["loss_nats"].mean()
    assert f"means over seeds span {means.max() - means.min():.3f} nats" in text
    assert means.idxmin() == "4-1-1-4-4-4-2-4"


def test_further_training_is_quoted_as_measured(agreements: dict[Any, dict[str, Any]]) -> None:
    text = page("docs/fidelity.md")

    def cells(row: dict[str, Any]) -> str:
        p = f"{row['p']:.3f}" if row["p"] < 0.1 else f"{row['p']:.2f}"
        tau = signed(row["tau"]) + ("" if row["low"] > 0.999 else f" ({interval(row)})")
        return " | ".join([tau, signed(row["by_chance"]), signed(row["corrected"]), p])

    everything = [agreements["high", rule, "further", "all", "inherited"] for rule in RULES]
    equal = [agreements["high", rule, "further", "equal total", "inherited"] for rule in RULES]
    for rule, *both in zip(RULES, everything, equal, strict=True):
        assert f"| `{rule}` | {' | '.join(map(cells, both))} |" in text
    total = pd.DataFrame([agreements["high", rule, "further", "all", "total"] for rule in RULES])
    low, high = (getattr(total[["tau", "by_chance", "corrected", "p"]], bound)() for bound in ("min", "max"))
    spans = [f"{signed(low[name])} to {signed(high[name])}" for name in ("tau", "by_chance", "corrected")]
    assert f"| total of groups | {' | '.join(spans)} | {low['p']:.3f} to {high['p']:.2f} | says nothing |" in text
    of_low, of_total = (agreements["low", "sliced", "further", "all", by] for by in ("inherited", "total"))
    assert (
        f"(τ = {of_low['tau']:.2f}; by chance {of_low['by_chance']:.2f}, and {of_low['p']:.0%} of random deals"
    ).replace("%", " %") in text
    assert f"total of groups {of_total['tau']:.2f})" in text


@pytest.mark.parametrize("script", ["recipe_study.py"], indirect=True)
def test_what_a_supernet_costs_the_largest_vector_is_quoted_as_measured(script: dict[str, Any]) -> None:
    text = page("docs/fidelity.md")
    gaps = pd.read_csv(DOCS / "fidelity" / "gaps.csv").sort_values(["rule", "seed"])
    for rule, bold in (("sliced", "**"), ("pooled", "")):
        one = gaps.loc[gaps["rule"] == rule, "gap_percent"]
        shown = " | ".join(f"{gap:.2f} %" for gap in one)
        assert f"| `{rule}` | {shown} | {bold}{one.mean():.2f} %{bold} |" in text
    sliced = gaps[gaps["rule"] == "sliced"]
    assert (
        f"was {sliced['gap_percent'].mean():.1f} % above a plain model's (`sliced`, mean of three seeds, "
        f"{sliced['gap_percent'].min():.1f} to {sliced['gap_percent'].max():.1f} %)"
    ) in page("README.md")
    plain = sliced["plain_loss_nats"]
    assert f"({100 * (plain.max() / plain.min() - 1):.2f} % between the best and the worst of three)" in text

    recipes = script["gaps"](pd.read_csv(DOCS / "fidelity" / "recipes.csv")).fillna({"recipe": "", "largest_share": 0})
    again = recipes.query("sharing == 'plain' and learning_rate == 2e-3 and batch == 32")["loss_nats_4"].item()
    first = plain[sliced["seed"] == 0].item()
    assert f"ended {100 * (first / again - 1):.1f} % lower ({again:.3f} nats, not {first:.3f})" in text
    few = recipes.query("batch == 16 and sharing == 'sliced' and recipe == 'mixed' and largest_first == 0")
    shares = few[few["seed"] == 0].set_index("largest_share")["gap_percent"]
    assert "{:.1f}, {:.1f} and {:.1f} %".format(*(shares[share] for share in (0.125, 0.25, 0.5))) in text
    low = pd.read_csv(DOCS / "fidelity" / "low_sliced.csv").query("total == 32").groupby("kind")["loss_nats"]
    alone = low.get_group("alone")
    assert (
        f"{100 * (low.get_group('inherited').item() / alone.iloc[0] - 1):.1f} % above seed 0 of the plain model, "
        f"{100 * (low.get_group('inherited').item() / alone.mean() - 1):.1f} % above the mean"
    ) in text


def test_what_a_supernets_steps_and_evaluations_cost_is_quoted_as_measured() -> None:
    text = page("docs/fidelity.md")
    steps = pd.read_csv(DOCS / "benchmarks" / "training_step.csv").set_index("space").loc[["tiny", "small"]]
    mixed, sandwich, pooled, separate = (
        [f"{value:.3f}" for value in steps[f"{name}_over_plain"]]
        for name in ("mixed", "sandwich", "pooled", "separate")
    )
    assert f"| a mixed step over a plain step, `sliced` | {' | '.join(mixed)} |" in text
    assert f"| `pooled`, `separate` | {pooled[0]}, {separate[0]} | {pooled[1]}, {separate[1]} |" in text
    assert f"| a sandwich step with the same rows | {' | '.join(sandwich)} |" in text
    evaluation = pd.read_csv(DOCS / "benchmarks" / "evaluation.csv").query("space == 'tiny'")
    assert "{}, {} and {} in three runs".format(*evaluation["per_vector_over_plain"]) in text
    assert f"take {evaluation['prefix_speedup'].min():.1f} to {evaluation['prefix_speedup'].max():.1f} times" in text


def test_what_further_training_changes_is_quoted_as_measured() -> None:
    changes, deviations, inherited_deviations = [], [], []
    for rule in RULES:
        rows = pd.read_csv(DOCS / "fidelity" / f"{rule}.csv")
        inherited, further = (rows[rows["kind"] == kind].set_index("vector")["loss_nats"] for kind in KINDS)
        changes.append((inherited - further).mean())
        deviations.append((inherited - further).std())
        inherited_deviations.append(inherited.std())
    assert (
        f"by {min(changes):.3f} to {max(changes):.3f} nats with a deviation of {min(deviations):.4f} to "
        f"{max(deviations):.4f}, where the inherited losses' is {min(inherited_deviations):.3f} to "
        f"{max(inherited_deviations):.3f}"
    ) in page("docs/fidelity.md")


def test_the_small_trained_checkpoint_is_quoted_as_measured() -> None:
    rows = records("stories260k/losses.csv", ["vector"])
    largest, two, one = (rows[f"{groups}-{groups}-{groups}-{groups}-{groups}",] for groups in (4, 2, 1))
    original = rows["checkpoint in transformers",]["before_nats"]
    assert round(original, 3) == round(largest["before_nats"], 3)
    assert abs(largest["after_nats"] - largest["before_nats"]) < 1e-6
    assert (
        f"everywhere end at {two['after_nats']:.2f} and {one['after_nats']:.2f} nats after {one['steps']} steps with "
        f"`train.output_rank={one['output_rank']}`, where the checkpoint has {original:.2f}"
    ) in page("README.md")
    alone = records("stories260k/losses-rank-0.csv", ["vector"])
    two_alone, one_alone = (alone[vector,]["after_nats"] for vector in ("2-2-2-2-2", "1-1-1-1-1"))
    table = page("docs/checkpoints.md")
    assert (
        f"two heads everywhere end at {two['after_nats']:.2f} nats and one at {one['after_nats']:.2f}. "
        f"Heads alone ended at {two_alone:.2f} and {one_alone:.2f}"
    ) in table
    assert f"(`init.align=null`) | {two['not_aligned_nats']:.2f} | {one['not_aligned_nats']:.2f} |" in table
    assert f"(**built**) | {two['before_nats']:.2f} | {one['before_nats']:.2f} |" in table


def test_the_estimate_of_the_a10g_is_quoted_as_measured() -> None:
    errors = pd.read_csv(DOCS / "a10g" / "errors.csv").dropna(subset="predicted")
    steps = errors[errors["kind"] == "decode step"]
    size, inside = 100 * steps["relative_error"].abs(), steps["inside"].astype(bool)
    check = read_json(ROOT / "latency_models" / "nvidia-a10g" / "device.json")["calibration"]["engines"]["none"][
        "check"
    ]
    off = f"it is {size.median():.1f} % off in the median and {size.max():.0f} % at worst"
    factors = f"{check['low']:.2f} to {check['high']:.2f} times the estimate"
    readme, docs = page("README.md"), page("docs/a10g.md")
    assert (
        f"Of {len(steps)} published decode steps of serving engines, each predicted without its source, {off}" in readme
    )
    assert (
        f"the interval in front.csv, {factors}, held {inside.sum()} of them when made from the other sources" in readme
    )
    assert f"Of {len(steps)} published decode steps of serving engines, from six sources" in docs
    assert (
        f"{off}: TGI of 2023 with 20 users. {(steps['published'] > steps['predicted']).sum()} of them took longer"
        in docs
    )
    assert f"expected: {factors}" in docs
    assert f"held {inside.sum()} of the {len(steps)} steps; it missed TGI's with 10 and 20 users" in docs
    assert list(steps.loc[~inside, "batch"]) == [10, 20]
    assert steps["origin"].nunique() == 6

    def medians(engine: str, column: str) -> pd.Series:
        rows = steps[steps["stack"].str.startswith(engine)]
        return 100 * (rows[column] / rows["published"] - 1).abs().groupby(rows["origin"], sort=False).median()

    before, after = ([f"{value:.0f}" for value in medians("TGI", column)] for column in ("predicted", "with_line"))
    quoted = "{}, {} and {} % to {}, {} and {} %".format(*before, *after)
    assert f"The line takes the sources' median error from {quoted}" in docs
    tgi = steps[steps["stack"].str.startswith("TGI")].groupby("origin", sort=False)
    slopes = [f"{np.polyfit(rows['batch'], rows['published'] - rows['predicted'], 1)[0]:.1f}" for _, rows in tgi]
    assert "(IBM, SageMaker) give {} and {} ms per sequence, 2.0.4 of 2024 {}.".format(*slopes) in docs
    line, nothing = (medians("vLLM", column).mean() for column in ("with_line", "predicted"))
    assert f"misses the third by {line:.0f} % (mean of their medians), nothing by {nothing:.0f} %" in docs
    longer = 100 * (steps["published"] / steps["predicted"] - 1)
    early, late = (longer[steps["stack"] == f"vLLM {version}"] for version in ("0.4.3", "0.23.0"))
    assert f"0.4.3 on an A10G took {early.min():.0f} to {early.max():.0f} % longer than the GPU's time" in docs
    assert f"A6000 {-late.iloc[0]:.0f} % less with few sequences and {late.iloc[-1]:.0f} % more with 215" in docs

    rows = pd.read_csv(DOCS / "a10g" / "headline.csv").set_index(["memory_gib", "model"])
    usable, announced = rows.loc[21.73], rows.loc[float("nan")]
    over = [usable, announced]
    ratios = [part["tokens_per_s"]["DeciLM-6B"] / part["tokens_per_s"]["Llama-2-7B"] for part in over]
    batches = [part["batch"][name] for part in over for name in ("DeciLM-6B", "Llama-2-7B")]
    prefill = usable["tokens_per_s_with_prefill"]
    assert (
        "it gives {:.1f} × ({} sequences against {}, what an A10G leaves) or {:.1f} × ({} against {}), ".format(
            ratios[0], *batches[:2], ratios[1], *batches[2:]
        )
        + f"and {prefill['DeciLM-6B'] / prefill['Llama-2-7B']:.1f} × with prefill"
    ) in readme


@pytest.mark.parametrize("script", ["bench_search.py"], indirect=True)
def test_where_an_automatic_budget_stops_is_quoted_as_measured(script: dict[str, Any]) -> None:
    table = pd.read_csv(DOCS / "search" / "auto.csv")
    assert " ".join(script["stops_table"](table).split()) in page("docs/search.md")


def test_how_long_the_report_takes_to_open_is_quoted_as_measured() -> None:
    text = page("docs/report.md")
    for row in pd.read_csv(DOCS / "report" / "opening.csv").to_dict("records"):
        cells = f"{row['vectors']:,} | {row['bytes'] / 1e6:.2f} | {row['open_s']:.2f} | {row['select_s']:.2f}"
        assert f"| {cells} |" in text
