"""The study behind docs/fidelity.md: how well the supernets of three sharing rules rank vectors, on a GPU.

    python scripts/fidelity_study.py run TEXT OUT [INDEX]    trains, compares, and writes OUT/*.csv
    python scripts/fidelity_study.py draw                    figure and tables from the CSVs in docs/fidelity

TEXT is a data.path. Several processes share the work (start one a GPU, or two, with INDEX 0, 1, …) and each writes the
same results; one that was stopped goes on.
"""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nas.cli import main as nas
from nas.data import prepare_tokens
from nas.data.corpora import TextCorpus
from nas.fidelity import agreement
from nas.hardware import cpu_name
from nas.report.fidelity import draw_fidelity
from nas.report.figure import figure
from nas.run import FinishedRun
from nas.stages.train import inherited_loss

SPACE, VOCABULARY, WINDOWS = "small", 8192, 256
RULES = ("sliced", "pooled", "separate")  # models trained alone are made in the comparison of the first
MORE_SEEDS = (1, 2)  # of supernets of the first rule, for the largest vector's gap
TRAIN = (
    *("steps=800", "batch=32", "learning_rate=2e-3", "largest_share=0.25", "compile=true"),
    *("log_every=100", "validate_every=1000", "checkpoint_every=200", "validation_windows=64"),
)
COMPARE = ("vectors=24", "equal_total=12", f"validation_windows={WINDOWS}", "further.steps=200")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "fidelity"


def run(text: str, out: Path, index: int) -> None:
    """Makes whatever of the study is not made yet, and writes its tables."""
    data = ("data=text", f"data.path={text}")
    out.mkdir(parents=True, exist_ok=True)
    train_all([(rule, 0) for rule in RULES], data, index)
    for rule in RULES:
        alone = () if rule == RULES[0] else ("alone.vectors=0",)
        name = f"{rule}-{index}"
        if not Path("runs/fidelity", name, "complete.json").is_file():
            assert nas(("fidelity", f"supernet=runs/train/{rule}-0", f"name={name}", *data, *COMPARE, *alone)) == 0
        table = pd.read_csv(Path("runs/fidelity", name, "measurements.csv"))
        table.assign(rule=rule, **machine()).to_csv(out / f"{rule}.csv", index=False)
    train_all([(RULES[0], seed) for seed in MORE_SEEDS], data, index)
    losses = {seed: largest_loss(text, f"{RULES[0]}-{seed}") for seed in MORE_SEEDS}
    table = pd.DataFrame({"rule": RULES[0], "seed": losses.keys(), "loss_nats": losses.values()})
    table.assign(**machine()).to_csv(out / "largest.csv", index=False)


def train_all(supernets: list[tuple[str, int]], data: tuple[str, ...], index: int) -> None:
    """Trains the supernets that no other process is at, and waits until all are trained."""
    turn = index % len(supernets)
    while missing := [name for name in supernets[turn:] + supernets[:turn] if not trained(*name)]:
        for rule, seed in missing:
            options = [f"train.{option}" for option in (*TRAIN, f"sharing={rule}", f"seed={seed}")]
            nas(("train", f"space={SPACE}", f"name={rule}-{seed}", *data, *options))  # refused where one is at it
        time.sleep(3)


def trained(rule: str, seed: int) -> bool:
    """Whether that supernet is there."""
    return Path(f"runs/train/{rule}-{seed}/complete.json").is_file()


def largest_loss(text: str, name: str) -> float:
    """Inherited loss of the largest vector."""
    data = prepare_tokens(TextCorpus(text), None, VOCABULARY, Path("runs/cache"))
    loss = inherited_loss(FinishedRun(Path("runs/train", name), "train"), data, WINDOWS, Path("runs"))
    return loss(loss.supernet.space.largest)


def machine() -> dict[str, str]:
    """Where and when."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {"device": device, "torch": torch.__version__, "date": datetime.now(UTC).date().isoformat()}


def draw() -> None:
    """Writes fidelity.png, agreement.csv and gaps.csv beside the measurements, and prints the tables."""
    measured = {rule: pd.read_csv(DOCS / f"{rule}.csv") for rule in RULES if (DOCS / f"{rule}.csv").is_file()}
    alone = measured[RULES[0]].query("kind == 'alone'")  # models that no supernet touched: the same for all rules
    tables = {}
    with figure(DOCS / "fidelity", width=12.6, height=3.9 * len(measured)) as drawing:
        for part, (rule, rows) in zip(np.ravel([drawing.subfigures(len(measured), 1)]), measured.items(), strict=True):
            everything = pd.concat([rows.query("kind != 'alone'"), alone])
            tables[rule] = agreement(everything)
            draw_fidelity(part, everything, tables[rule], rule)
    table = pd.concat(tables, names=["rule"]).reset_index("rule")
    table.to_csv(DOCS / "agreement.csv", index=False)
    print(table.round(3).to_string(index=False))

    at_largest = [rows[rows["kind"] == "inherited"].nlargest(1, "total").assign(seed=0) for rows in measured.values()]
    other_seeds = [pd.read_csv(file) for file in DOCS.glob("largest.csv")]
    gaps = pd.concat([*at_largest, *other_seeds])[["rule", "seed", "loss_nats"]]
    plain = alone[alone["total"] == alone["total"].max()].set_index("seed")["loss_nats"]
    gaps["plain_loss_nats"] = gaps["seed"].map(plain)
    gaps["gap_percent"] = 100 * (gaps["loss_nats"] / gaps["plain_loss_nats"] - 1)
    gaps.to_csv(DOCS / "gaps.csv", index=False)
    print(gaps.round(4).to_string(index=False))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    else:
        draw()
