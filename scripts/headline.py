"""The announcement's comparison, on a GPU of today with its memory capped to that of a 24 GB card.

DeciLM-6B's vector and the uniform 1, 2 and 4 against Llama-2-7B, eager and compiled: decode throughput at the largest
batch that fits and at rounder ones below it, its share of what the measured copy bandwidth allows, and joules per token
at the largest. PyTorch gets the cap as a whole; on a card of that size CUDA would take some of it. Weights are random:
neither memory nor time depends on them.

    python scripts/headline.py                 on a GPU: measures, writes docs/headline/headline.csv and the figure
    python scripts/headline.py --draw          draws the figure and prints the tables of the README and docs/latency.md
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from served_trial import copy_bandwidth, fits, memory_cap, served
from shared import argument_parser, gpu_origin, gpu_uuid, markdown_table, shipped_folder

from nas.errors import UserError
from nas.files import write_csv
from nas.latency.energy import measure_energy
from nas.latency.memory import MemoryModel
from nas.latency.predictor import Workload
from nas.latency.table import TableLatency
from nas.report.figure import COLOURS, figure
from nas.shape import ModelShape
from nas.space import Vector, load_space

OUT, VLLM = Path("docs/headline"), Path("docs/vllm/served.csv")
CONTEXT, PROMPT, MEMORY_GIB, ENERGY_S = 2048, 1024, 22.5, 5.0


def models() -> dict[str, tuple[ModelShape, Vector]]:
    """The models by name."""
    llama, decilm = load_space("llama-2-7b"), load_space("decilm-6b")
    named = {"DeciLM-6B": decilm.known_vectors["DeciLM-6B"]}
    named |= {f"uniform {vector[0]}": vector for vector in decilm.uniform_vectors()}
    shaped = {name: (decilm.shape, vector) for name, vector in named.items()}
    return {"Llama-2-7B": (llama.shape, llama.largest)} | shaped


def shipped_table(device: str, model: str, runtime: str) -> TableLatency:
    """The table that ships for one of the models on a device, by its name in PyTorch."""
    space = "llama-2-7b" if model == "Llama-2-7B" else "decilm-6b"
    return TableLatency(shipped_folder(device, space, runtime))


def measure(file: Path) -> None:
    """Writes all rows, each as it comes."""
    uuid, bandwidth = gpu_uuid(), copy_bandwidth()
    machine = {"context": CONTEXT, "memory_gib": MEMORY_GIB, "copy_tb_per_s": bandwidth / 1e12} | gpu_origin()
    rows: list[dict[str, Any]] = []
    for (name, (shape, vector)), runtime in itertools.product(models().items(), ("eager", "compiled")):
        with memory_cap(MEMORY_GIB):
            for why, batch in batches(shape, vector, runtime):
                row: dict[str, Any] = {"model": name, "runtime": runtime, "batch": batch, "why": why}
                with served(shape, vector, workload(batch, runtime)) as trial:
                    times, energy = trial.step_times_ms(), None
                    seconds = median(times) / 1e3
                    if "most" in why and (energy := measure_energy(trial.step, ENERGY_S, uuid, torch.cuda.synchronize)):
                        seconds = energy.seconds / energy.calls  # of the very steps whose power was read
                    row |= {"step_ms": 1e3 * seconds, "step_of": "energy" if energy else "rounds"}
                    row |= {"fastest_round_ms": min(times), "slowest_round_ms": max(times)}
                    row |= {"tokens_per_s": batch / seconds}
                    row["bandwidth_share"] = trial.bytes_per_step / seconds / bandwidth
                row["joules_per_token"] = energy.joules_per_call / batch if energy else None
                row["watts"] = energy.watts if energy else None
                rows.append(row | machine)
                print(row, flush=True)
                write_csv(file, pd.DataFrame(rows))


def batches(shape: ModelShape, vector: Vector, runtime: str) -> Iterator[tuple[str, int]]:
    """The batches to time, and why: the largest power of two, the largest of all, and the multiples of 16 near it.

    The largest is the memory model's, or the largest below it that fits; docs/memory has how close that is. It need not
    be the fastest: some numbers of rows suit cuBLAS better than others. Where the host cannot launch fast enough to
    notice, the multiples are left out.
    """

    def fit(batch: int) -> bool:
        return fits(shape, vector, workload(batch, runtime))

    most = MemoryModel(shape, workload(1, runtime), on_gpu=True).largest_batch(vector, MEMORY_GIB * 2**30)
    while most and not fit(most):
        most -= 1
    if not most:
        return
    power = 1 << (most.bit_length() - 1)
    while fit(2 * power):
        power *= 2
    most = max(most, power)
    near = range(-(-3 * most // 4 // 16) * 16, most + 1, 16) if runtime != "eager" else ()
    for batch in sorted({power, most, *near} - {0}):
        found = {"power of two": batch == power, "multiple of 16": batch in near, "most": batch == most}
        yield ", ".join(why for why, true in found.items() if true), batch


def workload(batch: int, runtime: str) -> Workload:
    return Workload(batch, CONTEXT, PROMPT, "bf16", runtime)


def draw(rows: pd.DataFrame) -> None:
    """Throughput by model, one bar a runtime, at each one's fastest batch."""
    best = rows.loc[rows.groupby(["model", "runtime"], sort=False)["tokens_per_s"].idxmax()]
    names = list(rows["model"].unique())
    with figure(OUT / "headline", width=7.2) as drawing:
        axes = drawing.subplots()
        for offset, (runtime, colour) in enumerate(zip(("eager", "compiled"), COLOURS, strict=False)):
            of_runtime = best[best["runtime"] == runtime].set_index("model").loc[names]
            bars = axes.bar(
                [index + 0.4 * offset for index in range(len(names))],
                of_runtime["tokens_per_s"],
                width=0.38,
                color=colour,
                label=runtime,
            )
            labels = [f"{row.tokens_per_s:,.0f}\nbatch {row.batch}" for row in of_runtime.itertuples()]
            axes.bar_label(bars, labels, fontsize=6, padding=2)
        axes.set_xticks([index + 0.2 for index in range(len(names))], names)
        axes.set_ylabel("decode tokens/s")
        axes.margins(y=0.15)
        axes.legend()
        first = rows.iloc[0]
        axes.set_title(
            f"{first['device']}, memory capped at {first['memory_gib']:g} GiB, context {first['context']}, bf16, "
            f"{str(first['date'])[:10]}",
            fontsize=9,
        )


def predicted(rows: pd.DataFrame) -> pd.DataFrame:
    """The lasting steps beside what the shipped tables of the card predict, which were measured in another session.

    Returns:
        Columns model, runtime, batch, step_ms, predicted_ms, relative_error; without what a table does not cover.
    """
    found = []
    for row in rows.to_dict("records"):
        _, vector = models()[row["model"]]
        with suppress(UserError):
            covering = shipped_table(row["device"], row["model"], row["runtime"])
            predicted_ms = covering.decode_ms(vector, row["batch"], row["context"])
            place = {key: row[key] for key in ("model", "runtime", "batch", "step_ms")}
            found.append(place | {"predicted_ms": predicted_ms, "relative_error": predicted_ms / row["step_ms"] - 1})
    return pd.DataFrame(found)


def table(rows: pd.DataFrame, vllm: pd.DataFrame) -> str:
    """docs/latency.md's table in Markdown, with vLLM's throughput of the models that it was tried with."""
    heads = ["model", "runtime", "batch", "tokens/s", "over Llama-2-7B", "of the bandwidth limit"]
    lines = []
    best = rows.loc[rows.groupby(["model", "runtime"], sort=False)["tokens_per_s"].idxmax()]
    joules = rows.dropna(subset="joules_per_token").set_index(["model", "runtime"])["joules_per_token"]
    best = pd.concat([best.sort_values("runtime", kind="stable", ascending=False), vllm])
    base = best[best["model"] == "Llama-2-7B"].set_index("runtime")["tokens_per_s"]
    for row in best.to_dict("records"):
        used, share = joules.get((row["model"], row["runtime"])), row["bandwidth_share"]
        rate, over = row["tokens_per_s"], row["tokens_per_s"] / base[row["runtime"]]
        cells = [row["model"], row["runtime"], row["batch"], f"{rate:,.0f}", f"{over:.1f} ×"]
        lines.append([*cells, "" if math.isnan(share) else f"{share:.0%}", "" if used is None else f"{used:.4f}"])
    return markdown_table([*heads, "J/token at the largest batch"], lines, "llrrrrr")


def served_by_vllm(device: str) -> pd.DataFrame:
    """Rows like those measured here, of scripts/vllm_check.py on that card."""
    served = pd.read_csv(VLLM)
    served = served[served["device"] == device]
    return served.assign(runtime="vLLM " + served["vllm"], tokens_per_s=1e3 * served["batch"] / served["vllm_ms"])


def beside_the_announcement(rows: pd.DataFrame, vllm: pd.DataFrame) -> str:
    """Deci's figures for DeciLM-6B over Llama 2 7B on an A10G, and these."""
    best = rows.groupby(["model", "runtime"])["tokens_per_s"].max().to_dict()
    powers = rows[rows["why"].str.contains("power of two")].groupby("model")["batch"].max()
    most = rows.groupby("model")["batch"].max()
    llama, decilm = "Llama-2-7B", "DeciLM-6B"

    at = rows.set_index(["model", "runtime", "batch"])["tokens_per_s"]

    def over(runtime: str) -> str:
        return f"{best[decilm, runtime] / best[llama, runtime]:.1f} ×"

    by_vllm, version = vllm.set_index("model"), vllm["runtime"].iloc[0]
    vllm_over = by_vllm["tokens_per_s"][decilm] / by_vllm["tokens_per_s"][llama]
    batches = f"{by_vllm['batch'][decilm]} and {by_vllm['batch'][llama]} sequences"
    lines = [
        ("largest batch, Llama 2 7B", "8", f"{most[llama]} (power of two: {powers[llama]})"),
        ("largest batch, DeciLM-6B", "64", f"{most[decilm]} (power of two: {powers[decilm]})"),
        ("throughput, plain PyTorch over plain PyTorch", "4.8 ×", f"{over('eager')} (`eager`)"),
        (
            "throughput, optimized at batch 128 over plain PyTorch at 8",
            "15 ×",
            f"{at[decilm, 'compiled', 128] / at[llama, 'eager', 8]:.1f} × (`compiled` over `eager`)",
        ),
        ("throughput, optimized over optimized", "–", f"{over('compiled')} (`compiled`)"),
        ("the same in a serving engine", "–", f"{vllm_over:.1f} × ({version}, {batches})"),
    ]
    return markdown_table(["DeciLM-6B over Llama 2 7B", "announced, A10G or A10", "here"], lines, "lrr")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    file = OUT / "headline.csv"
    if not parser.parse_args().draw:
        measure(file)
    rows = pd.read_csv(file)
    draw(rows)
    errors = predicted(rows)
    write_csv(OUT / "predicted.csv", errors)
    print(errors.groupby("runtime")["relative_error"].describe().round(4).to_string(), end="\n\n")
    vllm = served_by_vllm(rows["device"].iloc[0])
    print(beside_the_announcement(rows, vllm), table(rows, vllm), sep="\n\n")


if __name__ == "__main__":
    main()
