"""Calibrates the estimate of an A10G from published measurements, and says how far such estimates are off.

Reads the published facts in latency_models/nvidia-a10g: cards.csv (data sheets), a40_operators.csv (the kernels of
Llama-2-7B on an A40, which has the A10G's die) and published.csv (decode steps, prompts and matrix products). Every row
is then predicted by constants from the other sources alone. Writes the constants with their sources, what serving
engines add to a step, and the errors' summary to device.json; every error, their summary by source and the
announcement's workload to docs/a10g; and the tables of docs/a10g.md. The same CSVs give the same numbers.

    python scripts/calibrate_a10g.py
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.stats import t as student
from shared import argument_parser, fill_page, markdown_table

from nas.files import read_json, write_csv, write_json
from nas.latency import Device, Workload, find_device
from nas.latency.estimate import RooflineLatency
from nas.latency.memory import MemoryModel
from nas.report.figure import COLOURS, GREY, figure
from nas.shape import ModelShape
from nas.space import load_space

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "latency_models" / "nvidia-a10g"
OUT, PAGE = ROOT / "docs" / "a10g", ROOT / "docs" / "a10g.md"
FROZEN = "2026-11-28"
Cards = Mapping[str, Mapping[str, Any]]
Share = tuple[float, float]  # ms that an engine adds to a step, and for each sequence
LLAMA, DECILM = load_space("llama-2-7b"), load_space("decilm-6b")
SHAPES = {  # by the beginning of a model's name, with its K/V heads; everything else has Llama-2-7B's shape
    "Meta-Llama-3-8B": (ModelShape(32, 4096, 32, 128, 14336, 128256, 8192), 8),
    "Llama-3.1-8B": (ModelShape(32, 4096, 32, 128, 14336, 128256, 131072), 8),
    "Qwen2.5-7B": (ModelShape(28, 3584, 28, 128, 18944, 152064, 32768, qkv_bias=True), 4),
}
ENGINES = ("TGI", "vLLM")
COVERAGE = 0.9  # share of a further source's decode steps that the interval is to hold
GEMMS = ["attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"]
STEP, PROMPT, PRODUCT, LAYER, ATTENTION = "decode step", "prompt", "matrix product", "layer but attention", "attention"
KIND = {"median TTFT": PROMPT, "mean TTFT": PROMPT, "achieved": PRODUCT, LAYER: LAYER, ATTENTION: ATTENTION}
KIND |= dict.fromkeys(("median ITL", "median ms/token", "per-token", "mean TPOT", "median TPOT"), STEP)
ORIGIN = {
    "weight_bandwidth": "A40: bytes over time of a layer's four products with one token",
    "cache_bandwidth": "A40: least squares over the eight decode-attention times, with the next two",
    "cache_ramp_tokens": "see cache_bandwidth",
    "attention_ms": "see cache_bandwidth",
    "elementwise_bandwidth": "A40: bytes over time of norms, rotation, activation and residuals, 512 tokens or more",
    "elementwise_ms": "A40: their time with 32 tokens or fewer",
    "overlap": "A40: least squares over a layer's four products with 1 to 4096 tokens",
    "compute": "A10G: the lower of its fp16 matrix products' share of the data sheet and what its power limit allows",
}


@dataclass(frozen=True)
class Fit:
    """What the sources say.

    Attributes:
        constants: Of nas.latency.estimate.Constants, all but ``compute``, which depends on the card.
        kernel_share: Share of the matrix rate that kernels reach where power does not limit them.
        flops_per_s_a_watt: What a GA102 computes under its power limit, from the A40.
    """

    constants: dict[str, float]
    kernel_share: float
    flops_per_s_a_watt: float

    def device(self, card: Mapping[str, Any]) -> Device:
        """A card of cards.csv with these constants."""
        compute = self.kernel_share
        if card["die"] == "GA102":  # another process has other joules an operation
            compute = min(compute, _rounded(self.flops_per_s_a_watt * card["power_w"] / card["fp16_flops"]))
        return _device(card, self.constants | {"compute": compute})


def _device(card: Mapping[str, Any], constants: dict[str, float]) -> Device:
    engines = {"none": {"step_ms": 0.0, "sequence_ms": 0.0}}
    calibration = {"dtypes": ["bf16"], "constants": constants, "engines": engines}
    bandwidth, flops = card["bandwidth_bytes_per_s"], {"bf16": card["fp16_flops"]}
    return Device(card["gpu"], card["gpu"], True, 0, bandwidth, flops, calibration=calibration)


def read_facts() -> tuple[Cards, pd.DataFrame, pd.DataFrame]:
    """The cards by name, the A40's operators, and the published points, with a column ``origin``: whose they are."""
    cards = {card["gpu"]: card for card in _records(pd.read_csv(FACTS / "cards.csv"))}
    operators, published = pd.read_csv(FACTS / "a40_operators.csv"), pd.read_csv(FACTS / "published.csv")
    published["origin"] = published["source"].str.replace("( @|#|:).*|GitHub ", "", regex=True)
    return cards, operators.assign(origin="microsoft/vidur"), published


def fit(cards: Cards, operators: pd.DataFrame, published: pd.DataFrame) -> Fit:
    """The constants, from these facts."""
    a40 = cards["A40"]
    products = {
        gpu: (1e12 * published.loc[(published["unit"] == "TFLOPS") & (published["gpu"] == gpu), "value"]).median()
        for gpu in ("A10G", "A40")
    }
    share, reached = products["A10G"] / cards["A10G"]["fp16_flops"], products["A40"]
    if operators.empty:
        constants = _without_operators(cards, published)
    else:
        constants, reached = _from_operators(a40, operators)
    if np.isnan(share):  # nothing on an A10G itself: what the A40 reaches, which its power limit may have lowered
        share = reached / a40["fp16_flops"]
    rounded = {name: _rounded(value) for name, value in constants.items()}
    return Fit(rounded, _rounded(share), _rounded(reached / a40["power_w"]))


def _without_operators(cards: Cards, published: pd.DataFrame) -> dict[str, float]:
    """The data sheet's, but for the share of the bandwidth at which whole steps of one sequence run."""
    steps = published[(published["metric"].map(KIND) == STEP) & (published["batch"] == 1)]
    sheets = {gpu: _device(card, {}) for gpu, card in cards.items()}
    share = np.median([gpu_value(row, sheets[row["gpu"]]) / row["value"] for row in _records(steps)])
    return {"weight_bandwidth": float(share), "cache_bandwidth": float(share)}


def _from_operators(a40: Mapping[str, Any], operators: pd.DataFrame) -> tuple[dict[str, float], float]:
    """The constants, and the operations per second of large GEMMs."""
    bytes_a_ms = a40["bandwidth_bytes_per_s"] / 1e3
    gemms = operators[operators["operator"].isin(GEMMS)]
    products = gemms.groupby("batch")[["median_ms", "moved_bytes", "operations"]].sum()
    small = operators[operators["operator"] == "elementwise"].set_index("batch")
    reached = small["moved_bytes"] / small["median_ms"] / bytes_a_ms
    operations_a_ms = (products["operations"] / products["median_ms"])[products.index >= 1024].median()
    weight_bandwidth = products["moved_bytes"].iloc[0] / products["median_ms"].iloc[0] / bytes_a_ms
    times_ms = products["moved_bytes"] / (bytes_a_ms * weight_bandwidth), products["operations"] / operations_a_ms
    constants = {
        "weight_bandwidth": weight_bandwidth,
        **_attention(operators[operators["operator"] == "attention"], bytes_a_ms),
        "elementwise_bandwidth": reached[reached.index >= 512].median(),
        "elementwise_ms": small.loc[small.index <= 32, "median_ms"].median(),
        "overlap": _overlap(np.stack(times_ms), products["median_ms"].to_numpy()),
    }
    return constants, 1e3 * operations_a_ms


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], rows.to_dict("records"))


def _attention(rows: pd.DataFrame, bytes_a_ms: float) -> dict[str, float]:
    """Least squares of relative errors of: fixed time + (bytes of the cache + bytes of the ramp) / bandwidth."""
    read_ms = rows["moved_bytes"] / bytes_a_ms
    terms = np.stack([np.ones(len(rows)), read_ms, read_ms / rows["length"]], axis=1) / rows[["median_ms"]].to_numpy()
    fixed_ms, inverse_share, ramp = np.linalg.lstsq(terms, np.ones(len(rows)), rcond=None)[0]
    return {
        "cache_bandwidth": 1 / inverse_share,
        "cache_ramp_tokens": ramp / inverse_share,
        "attention_ms": fixed_ms,
    }


def _overlap(times_ms: npt.NDArray[np.float64], measured_ms: npt.NDArray[np.float64]) -> float:
    def error(exponent: float) -> float:
        return float(np.sum(np.log(np.linalg.norm(times_ms, ord=exponent, axis=0) / measured_ms) ** 2))

    return float(minimize_scalar(error, bounds=(1, 20), method="bounded").x)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def gpu_value(row: Mapping[str, Any], device: Device) -> float:
    """A published row, in its unit, predicted as the GPU's time alone."""
    kind = KIND[row["metric"]]
    if kind == PRODUCT:
        compute: float = cast(dict[str, Any], device.calibration)["constants"]["compute"]
        return device.flops["bf16"] * compute / 1e12
    shapes = [found for name, found in SHAPES.items() if row["model"].startswith(name)]
    shape, groups = shapes[0] if shapes else (LLAMA.shape, 32)
    model = RooflineLatency(device, shape, "bf16")
    vector, batch, prompt = [groups] * shape.num_hidden_layers, int(row["batch"]), int(row["prompt"])
    if kind == LAYER:
        return model.layer_ms("decode", groups, batch, 0)
    if kind == ATTENTION:  # the A40's, whose row says how many of the 32 heads a card has
        part = model.layer_ms("decode", groups, batch, prompt) - model.layer_ms("decode", groups, batch, 0)
        return float(part * row["kv_heads"] / groups)
    if kind == PROMPT:
        return model.prefill_ms(vector, batch, prompt)
    step = model.decode_ms(vector, batch, round(prompt + row["gen"] / 2))  # half of the tokens are there on average
    if row["metric"] == "mean TPOT":  # which holds the prompts of the others that come meanwhile, one from each
        step += (batch - 1) * model.prefill_ms(vector, 1, prompt) / (row["gen"] - 1)
    return step


def engine_share(engine: str, found: Fit, cards: Cards, published: pd.DataFrame) -> Share:
    """A line through an engine's decode steps less the GPU's time: relative errors, every source counts the same."""
    rows = published[(published["metric"].map(KIND) == STEP) & published["stack"].str.startswith(engine)]
    rest = [row["value"] - gpu_value(row, found.device(cards[row["gpu"]])) for row in _records(rows)]
    weight = 1 / (rows["value"] * rows.groupby("origin")["value"].transform("size") ** 0.5)
    terms = np.stack([weight, weight * rows["batch"]], axis=1)
    step_ms, sequence_ms = np.linalg.lstsq(terms, weight * rest, rcond=None)[0]
    return _rounded(step_ms), _rounded(sequence_ms)


def predict_all(cards: Cards, operators: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Every published row, and the A40's kernels, predicted from the other sources where it can be.

    Columns ``predicted`` (the GPU's time) and ``with_line`` (and the line of its engine).
    """
    rows = []
    everything = pd.concat([published, _kernels(operators)], ignore_index=True)
    for origin, theirs in everything.groupby("origin", sort=False):
        others = published[(published["origin"] != origin) & published["left_out"].isna()]
        found = fit(cards, operators[operators["origin"] != origin], others)
        lines = {engine: engine_share(engine, found, cards, others) for engine in ENGINES}
        for row in _records(theirs):
            predicted = with_line = np.nan
            if pd.isna(row["left_out"]):
                predicted = gpu_value(row, found.device(cards[row["gpu"]]))
                engine = row["stack"].split(" ")[0]
                if engine in lines and KIND[row["metric"]] == STEP:
                    with_line = predicted + lines[engine][0] + lines[engine][1] * row["batch"]
            rows.append({**row, "predicted": round(predicted, 3), "with_line": round(with_line, 3)})
    return pd.DataFrame(rows).rename(columns={"value": "published", "left_out": "why_not"})


def _kernels(operators: pd.DataFrame) -> pd.DataFrame:
    """The A40's kernels as rows like the published ones: those of a layer with so many tokens, and attention's."""
    layers = operators[operators["operator"].isin([*GEMMS, "elementwise"])].groupby("batch")["median_ms"].sum()
    attention = operators[operators["operator"] == "attention"]
    frames = [
        pd.DataFrame({"batch": layers.index, "prompt": 0, "metric": LAYER, "value": layers.to_numpy()}),
        attention[["batch"]].assign(
            prompt=attention["length"], kv_heads=attention["kv_heads"], metric=ATTENTION, value=attention["median_ms"]
        ),
    ]
    return pd.concat(frames).assign(
        gpu="A40",
        stack="vidur's profile",
        model="Llama-2-7b",
        dtype="fp16",
        unit="ms",
        left_out=np.nan,
        origin="microsoft/vidur",
        source="a40_operators.csv",
    )


def interval(ratios: pd.Series, origins: pd.Series) -> tuple[float, float]:
    """Between which factors of the prediction most steps of a further source are to be expected.

    Sources are taken as drawn from one normal distribution of the logarithm, their steps from another around each.
    """
    by_origin = np.log(ratios).groupby(origins)
    means = by_origin.mean()
    spread = np.sqrt(means.var() * (1 + 1 / len(means)) + by_origin.var(ddof=0).mean())
    half = student.ppf((1 + COVERAGE) / 2, len(means) - 1) * spread
    return _rounded(np.exp(means.mean() - half)), _rounded(np.exp(means.mean() + half))


def _check(steps: pd.DataFrame, predicted: str) -> dict[str, Any]:
    """How far the predictions in that column are off, and the interval."""
    error = (steps[predicted] / steps["published"] - 1).abs()
    low, high = interval(steps["published"] / steps[predicted], steps["origin"])
    counts = {"points": len(steps), "sources": int(steps["origin"].nunique())}
    errors = {"median_error": _rounded(error.median()), "worst_error": _rounded(error.max())}
    return {**counts, **errors, "interval_share": COVERAGE, "low": low, "high": high}


def _source_error(steps: pd.DataFrame, predicted: str) -> float:
    """The mean of the sources' median errors."""
    error = (steps[predicted] / steps["published"] - 1).abs()
    return float(error.groupby(steps["origin"]).median().mean())


def _held(errors: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Adds the interval that the decode steps of the other sources give, and whether it holds what was published."""
    predicted = errors["predicted"]
    for origin in errors.loc[predicted.notna(), "origin"].unique():
        others, theirs = steps[steps["origin"] != origin], errors["origin"] == origin
        low, high = interval(others["published"] / others["predicted"], others["origin"])
        rates = errors["unit"] == "TFLOPS"  # the inverse of times
        errors.loc[theirs, "low"] = (predicted * np.where(rates, 1 / high, low)).round(3)
        errors.loc[theirs, "high"] = (predicted * np.where(rates, 1 / low, high)).round(3)
    inside = errors["published"].between(errors["low"], errors["high"])
    return errors.assign(inside=inside.where(predicted.notna()))


def calibrate() -> tuple[dict[str, Any], pd.DataFrame]:
    """The calibration of device.json, and errors.csv."""
    cards, operators, published = read_facts()
    usable = published[published["left_out"].isna()]
    found = fit(cards, operators, usable)
    errors = predict_all(cards, operators, published)
    errors.insert(0, "kind", errors["metric"].map(KIND))
    steps = errors[errors["predicted"].notna() & (errors["kind"] == STEP)]
    engines = {"none": {"step_ms": 0.0, "sequence_ms": 0.0, "check": _check(steps, "predicted")}}
    errors = _held(errors, steps)
    errors["relative_error"] = (errors["predicted"] / errors["published"] - 1).round(4)
    for engine in ENGINES:
        rows = steps[steps["stack"].str.startswith(engine)]
        # A line is worth having where it predicts sources that it was not fitted to better than nothing does.
        column = min(("predicted", "with_line"), key=partial(_source_error, rows))
        step_ms, sequence_ms = engine_share(engine, found, cards, usable) if column == "with_line" else (0.0, 0.0)
        check, most = _check(rows, column), int(rows["batch"].max())
        share = {"step_ms": step_ms, "sequence_ms": sequence_ms, "most_sequences": most, "check": check}
        engines[engine.lower()] = share
        errors.loc[rows.index, "with_engine"] = rows[column]
        errors.loc[rows.index, "engine_error"] = (rows[column] / rows["published"] - 1).round(4)
        # With so few sources only the whole interval, which these steps made too.
        ratio = rows["published"] / rows[column]
        errors.loc[rows.index, "engine_inside"] = ratio.between(check["low"], check["high"]).astype(float)
    calibration = {
        "date": FROZEN,
        "dtypes": ["bf16"],
        "constants": cast(dict[str, Any], found.device(cards["A10G"]).calibration)["constants"],
        "from": ORIGIN,
        "flops_per_s_a_watt": found.flops_per_s_a_watt,
        "measurements": len(operators) + int(((usable["unit"] == "TFLOPS") & (usable["gpu"] == "A10G")).sum()),
        "engines": engines,
    }
    return calibration, errors


def by_source(errors: pd.DataFrame) -> pd.DataFrame:
    """sources.csv: how far what each source published is from what the others predict."""
    rows = []
    used = errors.dropna(subset="predicted")
    engine = used["stack"].str.split(" ").str[0].str.lower()
    engine = engine.where(used["with_engine"].notna(), "none")
    for (origin, kind, name), theirs in used.groupby(["origin", "kind", engine], sort=False):
        predictions = {"none": ("relative_error", "inside")}
        if name != "none":
            predictions[str(name)] = "engine_error", "engine_inside"
        for added, (error, inside) in predictions.items():
            size = theirs[error].abs()
            rows.append(
                {
                    "origin": origin,
                    "cards": ", ".join(theirs["gpu"].unique()),
                    "kind": kind,
                    "engine": name,
                    "predicted": f"engine={added}",
                    "points": len(theirs),
                    "median_error": _rounded(size.median()),
                    "worst_error": _rounded(size.max()),
                    "inside": int(theirs[inside].sum()),
                }
            )
    return pd.DataFrame(rows)


def headline(calibration: dict[str, Any]) -> pd.DataFrame:
    """headline.csv: the announcement's workload on an A10G, by the estimate.

    With prefill: prompts of 1,024 tokens and as many generated ones, whose steps are at 1,536 tokens on average.
    """
    device = dataclasses.replace(find_device("nvidia-a10g"), calibration=calibration)
    rows = []
    for gib in (22.5, np.floor(100 * device.usable_bytes / 2**30) / 100, None):  # a cap; what an A10G leaves; announced
        for name, shape, vector, announced in (
            ("Llama-2-7B", LLAMA.shape, LLAMA.largest, 8),
            ("DeciLM-6B", DECILM.shape, DECILM.known_vectors["DeciLM-6B"], 64),
        ):
            memory = MemoryModel(shape, Workload(1, 2048, 1024, "bf16", "compiled"), on_gpu=True)
            batch = memory.largest_batch(vector, gib * 2**30) if gib else announced
            model = RooflineLatency(device, shape, "bf16")
            step, prefill = model.decode_ms(vector, batch, 2048), model.prefill_ms(vector, batch, 1024)
            whole = prefill + 1024 * model.decode_ms(vector, batch, 1536)
            low, high = model.interval(step)
            rows.append(
                {
                    "memory_gib": gib,
                    "model": name,
                    "batch": batch,
                    "decode_ms": step,
                    "decode_ms_low": low,
                    "decode_ms_high": high,
                    "prefill_ms": prefill,
                    "tokens_per_s": 1e3 * batch / step,
                    "tokens_per_s_low": 1e3 * batch / high,
                    "tokens_per_s_high": 1e3 * batch / low,
                    "tokens_per_s_with_prefill": 1e3 * batch * 1024 / whole,
                }
            )
    return pd.DataFrame(rows).round(3)


def sources_table(sources: pd.DataFrame) -> str:
    """The errors by source as a table of docs/a10g.md."""
    heads = ["published by", "cards", "what", "predicted", "points", "median error", "worst", "inside"]
    lines = []
    for row in _records(sources):
        what = row["kind"] if row["engine"] == "none" else f"{row['kind']}, {row['engine']}"
        errors = f"{row['median_error']:.1%}", f"{row['worst_error']:.1%}"
        lines.append([row["origin"], row["cards"], what, row["predicted"], row["points"], *errors, row["inside"]])
    return markdown_table(heads, lines, "llllrrrr")


def engines_table(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """What engines add, and how far off that is for sources left out, as a table of docs/a10g.md."""
    heads = ["`workload.engine`", "adds to a step", "sequences", "points, sources", "median error", "worst", "interval"]
    lines = []
    for name, share in engines.items():
        check, most = share["check"], share.get("most_sequences")
        added = f"{share['step_ms']:g} ms + {share['sequence_ms']:g} ms per sequence" if share["step_ms"] else "nothing"
        counts = [f"up to {most}" if most else "any", f"{check['points']}, {check['sources']}"]
        errors = [f"{check['median_error']:.1%}", f"{check['worst_error']:.1%}"]
        lines.append([name, added, *counts, *errors, f"× {check['low']:.2f} to {check['high']:.2f}"])
    return markdown_table(heads, lines, "llllrrl")


def headline_table(rows: pd.DataFrame) -> str:
    """The announcement's workload, beside what an H100 measured at the same batches, as a table of docs/a10g.md."""
    heads = ["memory", "model", "batch", "step", "tokens/s", "over Llama", "with prefill", "over Llama"]
    measured = pd.read_csv(OUT.parent / "headline" / "headline.csv").set_index(["model", "runtime", "batch"])
    lines = []
    for row in _records(rows):
        if row["model"] == "Llama-2-7B":  # first at each size of memory
            llama = row
        where = "announced batch" if pd.isna(row["memory_gib"]) else f"{row['memory_gib']:g} GiB"
        over, over_with_prefill = (
            f"{row[key] / llama[key]:.1f} ×" for key in ("tokens_per_s", "tokens_per_s_with_prefill")
        )
        step = f"{row['decode_ms']:.1f} ({row['decode_ms_low']:.0f} to {row['decode_ms_high']:.0f}) ms"
        interval = f"({row['tokens_per_s_low']:,.0f} to {row['tokens_per_s_high']:,.0f})"
        cells = [where, row["model"], row["batch"], step, f"{row['tokens_per_s']:,.0f} {interval}", over]
        h100 = measured["tokens_per_s"].get((row["model"], "compiled", row["batch"]))
        with_prefill = [f"{row['tokens_per_s_with_prefill']:,.0f}", over_with_prefill]
        lines.append([*cells, *with_prefill, "–" if h100 is None else f"{h100:,.0f}"])
    return markdown_table([*heads, "H100, tokens/s"], lines, "llrrrrrrr")


def draw(errors: pd.DataFrame, check: Mapping[str, Any], path: Path) -> None:
    """The decode steps: published over predicted by batch, a colour for each source, with the interval."""
    steps = errors[(errors["kind"] == STEP) & errors["predicted"].notna()]
    with figure(path, width=7.2, height=4.4) as drawing:
        axes = drawing.add_subplot()
        axes.axhspan(check["low"], check["high"], color=GREY, alpha=0.25, linewidth=0, label="interval")
        for number, ((_, stack), rows) in enumerate(steps.groupby(["origin", "stack"], sort=False)):
            colour, marker = COLOURS[number % len(COLOURS)], "s" if str(stack).startswith("vLLM") else "o"
            label = f"{', '.join(rows['gpu'].unique())}: {stack}"
            axes.plot(rows["batch"], rows["published"] / rows["predicted"], marker, color=colour, label=label)
        axes.axhline(1, color=GREY)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("sequences decoded at once")
        axes.set_ylabel("published over predicted step")
        drawing.legend(loc="outside upper center", ncol=2, fontsize=7)


def main() -> None:
    """Prints the calibration's checks; writes the calibration, the errors, their figure and the page's tables."""
    argument_parser(__doc__).parse_args()
    calibration, errors = calibrate()
    engines, sources, rows = calibration["engines"], by_source(errors), headline(calibration)
    for engine, share in engines.items():
        print(engine, share)
    print(sources.to_string(), rows.to_string(), sep="\n")
    device = read_json(FACTS / "device.json")
    write_json(FACTS / "device.json", device | {"calibration": calibration})
    for name, table in {"errors": errors, "sources": sources, "headline": rows}.items():
        write_csv(OUT / f"{name}.csv", table.assign(date=FROZEN, made_by="scripts/calibrate_a10g.py"))
    draw(errors, engines["none"]["check"], OUT / "errors.png")
    fill_page(PAGE, sources=sources_table(sources), engines=engines_table(engines), headline=headline_table(rows))


if __name__ == "__main__":
    main()
