"""Calibrates the estimate of an A10G from published measurements, and says how far such estimates are off.

Reads the published facts in latency_models/nvidia-a10g: cards.csv (data sheets), a40_operators.csv (the kernels of
Llama-2-7B on an A40, which has the A10G's die) and published.csv (whole models, and matrix products). Each row of
published.csv is then predicted by constants from the other sources alone. Writes the constants with their sources, and
the summary of the errors, to device.json; every error to docs/a10g/errors.csv, docs/a10g/errors.png and the table of
docs/a10g.md. The same CSVs give the same numbers.

    python scripts/calibrate_a10g.py
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar

from nas.files import read_json, write_atomically, write_json
from nas.latency import Device
from nas.latency.estimate import RooflineLatency
from nas.report.figure import COLOURS, GREY, figure
from nas.space import load_space

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "latency_models" / "nvidia-a10g"
ERRORS, PAGE = ROOT / "docs" / "a10g" / "errors.csv", ROOT / "docs" / "a10g.md"
FROZEN = "2026-11-25"
Cards = Mapping[str, Mapping[str, Any]]
COVERAGE = 0.9  # probability with which the interval holds a point that is like the predicted ones
GEMMS = ["attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"]
PHASE = {"median ITL": "decode", "median ms/token": "decode", "per-token": "decode", "median TTFT": "prefill"}
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
        calibration = {"dtypes": ["bf16"], "constants": self.constants | {"compute": compute}}
        bandwidth, flops = card["bandwidth_bytes_per_s"], {"bf16": card["fp16_flops"]}
        return Device(card["gpu"], card["gpu"], True, 0, bandwidth, flops, calibration=calibration)


def read_facts() -> tuple[Cards, pd.DataFrame, pd.DataFrame]:
    """The cards by name, the A40's operators, and the published points."""
    cards = {card["gpu"]: card for card in _records(pd.read_csv(FACTS / "cards.csv"))}
    return cards, pd.read_csv(FACTS / "a40_operators.csv"), pd.read_csv(FACTS / "published.csv")


def fit(cards: Cards, operators: pd.DataFrame, published: pd.DataFrame) -> Fit:
    """The constants, from these facts."""
    a40 = cards["A40"]
    bytes_a_ms = a40["bandwidth_bytes_per_s"] / 1e3
    columns = ["median_ms", "moved_bytes", "operations"]
    products = operators[operators["operator"].isin(GEMMS)].groupby("batch")[columns].sum()
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
    share = (1e12 * _matrix_products(published)["value"] / cards["A10G"]["fp16_flops"]).median()
    if np.isnan(share):  # nothing on an A10G itself: what the A40 reaches, which its power limit may have lowered
        share = 1e3 * operations_a_ms / a40["fp16_flops"]
    rounded = {name: _rounded(value) for name, value in constants.items()}
    return Fit(rounded, _rounded(share), _rounded(1e3 * operations_a_ms / a40["power_w"]))


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], rows.to_dict("records"))


def _matrix_products(published: pd.DataFrame) -> pd.DataFrame:
    return published[(published["unit"] == "TFLOPS") & (published["gpu"] == "A10G")]


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
    """A published row, in its unit, predicted without the engine's own work."""
    if row["unit"] == "TFLOPS":
        compute: float = cast(dict[str, Any], device.calibration)["constants"]["compute"]
        return device.flops["bf16"] * compute / 1e12
    space = load_space("llama-2-7b")
    model = RooflineLatency(device, space.shape, "bf16")
    if PHASE[row["metric"]] == "prefill":
        return model.prefill_ms(space.largest, int(row["batch"]), int(row["prompt"]))
    context = round(row["prompt"] + row["gen"] / 2)  # half of the generated tokens are there on average
    return model.decode_ms(space.largest, int(row["batch"]), context)


def engine_ms(found: Fit, cards: Cards, published: pd.DataFrame) -> tuple[float, float]:
    """What TGI adds to a step, and to a step for each sequence: a line through its decode rows less the GPU's time.

    A property of that engine and those versions, not of a card.
    """
    decoding = published["metric"].map(PHASE) == "decode"
    rows = published[decoding & published["stack"].str.startswith("TGI")]
    rest = [row["value"] - gpu_value(row, found.device(cards[row["gpu"]])) for row in _records(rows)]
    per_sequence, per_step = np.polyfit(rows["batch"], rest, 1)
    return _rounded(per_step), _rounded(per_sequence)


def predict_all(cards: Cards, operators: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """errors.csv without its intervals: every published row, predicted from the other sources where it can be."""
    rows = []
    for source, theirs in published.groupby("source", sort=False):
        others = published[(published["source"] != source) & published["left_out"].isna()]
        found = fit(cards, operators, others)
        per_step_ms, per_sequence_ms = engine_ms(found, cards, others)
        for row in _records(theirs):
            predicted = np.nan
            if pd.isna(row["left_out"]):
                predicted = gpu_value(row, found.device(cards[row["gpu"]]))
                if row["stack"].startswith("TGI"):
                    predicted += per_step_ms + per_sequence_ms * row["batch"]
            rows.append({**row, "predicted": predicted})
    table = pd.DataFrame(rows).rename(columns={"value": "published", "left_out": "why_not"})
    table["predicted"] = table["predicted"].round(3)
    table["relative_error"] = (table["predicted"] / table["published"] - 1).round(4)
    return table


def calibrate() -> tuple[dict[str, Any], pd.DataFrame]:
    """The calibration of device.json, and errors.csv."""
    cards, operators, published = read_facts()
    found = fit(cards, operators, published)
    errors = predict_all(cards, operators, published)
    predicted = errors.dropna(subset="predicted")
    factors = np.exp(np.abs(np.log(predicted["published"] / predicted["predicted"])))
    rank = math.ceil(COVERAGE * (len(factors) + 1))  # so that a further point, drawn like these, is as likely inside
    factor = math.ceil(1e3 * np.sort(factors)[rank - 1]) / 1e3
    errors["low"], errors["high"] = (errors["predicted"] / factor).round(3), (errors["predicted"] * factor).round(3)
    errors["inside"] = errors["published"].between(errors["low"], errors["high"]).where(errors["predicted"].notna())
    per_step_ms, per_sequence_ms = engine_ms(found, cards, published[published["left_out"].isna()])
    sizes = predicted["relative_error"].abs()
    calibration = {
        "date": FROZEN,
        "dtypes": ["bf16"],
        "constants": cast(dict[str, Any], found.device(cards["A10G"]).calibration)["constants"],
        "from": ORIGIN,
        "flops_per_s_a_watt": found.flops_per_s_a_watt,
        "engines": {"TGI": {"step_ms": per_step_ms, "sequence_ms": per_sequence_ms}},
        "measurements": len(operators) + len(_matrix_products(published)),
        "check": {
            "points": len(predicted),
            "median_error": _rounded(sizes.median()),
            "worst_error": _rounded(sizes.max()),
            "interval_share": COVERAGE,
            "interval_factor": factor,
        },
    }
    return calibration, errors


def markdown(errors: pd.DataFrame) -> str:
    """The errors as the table of docs/a10g.md."""
    lines = [
        "| published by | what | published | predicted | error | interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in _records(errors.dropna(subset="predicted")):
        source = re.sub(" @.*", "", row["source"]).removeprefix("GitHub ")
        what = f"{row['gpu']}, {row['stack']}, {row['model']}"
        what += "" if pd.isna(row["batch"]) else f", {row['metric']}, batch {row['batch']:g}, prompt {row['prompt']:g}"
        interval = f"{row['low']:.4g} to {row['high']:.4g}" + ("" if row["inside"] else ": **missed**")
        values = f"{row['published']:g} {row['unit']} | {row['predicted']:.4g} | {row['relative_error']:+.1%}"
        lines.append(f"| {source} | {what} | {values} | {interval} |")
    return "\n".join(lines)


def draw(errors: pd.DataFrame, path: Path) -> None:
    """Predicted against published, in per cent, with the intervals."""
    predicted = errors.dropna(subset="predicted").iloc[::-1].reset_index(drop=True)
    kinds = list(predicted["metric"].unique())[::-1]
    with figure(path, width=7.2, height=4.6) as drawing:
        axes = drawing.add_subplot()
        for name, rows in predicted.groupby("metric", sort=False):
            low, middle, high = (100 * (rows[key] / rows["published"]) for key in ("low", "predicted", "high"))
            colour = COLOURS[kinds.index(name)]
            axes.errorbar(middle, rows.index, xerr=(middle - low, high - middle), fmt="o", color=colour, label=name)
        axes.axvline(100, color=GREY, zorder=0)
        loads = predicted["batch"].map("batch {:g}".format, na_action="ignore").fillna(predicted["model"])
        loads = loads.where(predicted["metric"] != "median TTFT", predicted["prompt"].map("prompt {:g}".format))
        engines = predicted["stack"].str.split(" ").str[0]
        axes.set_yticks(predicted.index, predicted["gpu"] + ", " + engines + ", " + loads, fontsize=7)
        axes.set_xlabel("predicted, in % of published; bars: the interval")
        drawing.legend(loc="outside upper center", ncol=len(kinds), fontsize=8)


def main(write: bool) -> None:
    """Prints the calibration's check; writes the calibration, the errors, their figure and their table."""
    calibration, errors = calibrate()
    print(calibration["check"])
    if not write:
        return
    device = read_json(FACTS / "device.json")
    write_json(FACTS / "device.json", device | {"calibration": calibration})
    write_atomically(ERRORS, lambda path: errors.to_csv(path, index=False))
    draw(errors, ERRORS.with_suffix(".png"))
    page = PAGE.read_text(encoding="utf-8")
    filled = re.sub(
        r"(?<=<!-- errors -->\n).*?(?=\n<!-- /errors -->)", lambda _: markdown(errors), page, flags=re.DOTALL
    )
    write_atomically(PAGE, lambda path: path.write_text(filled, encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print the errors and write nothing")
    main(write=not parser.parse_args().check)
