"""The study behind docs/fidelity.md: how well the supernets of three sharing rules rank vectors, on a GPU.

    python scripts/fidelity_study.py run TEXT OUT    trains, compares, and writes OUT/*.csv
    python scripts/fidelity_study.py draw            figure and tables from the CSVs in docs/fidelity

Two settings: at a high learning rate all rules are compared with further training; at a low one, where models trained
alone differ less from seed to seed, the first rule is compared with these too. TEXT is a data.path. A study that was
stopped goes on.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from shared import argument_parser, finished

from nas.data import prepare_tokens
from nas.data.corpora import TextCorpus
from nas.files import write_csv
from nas.ranking import agreement
from nas.report.agreement import draw_fidelity
from nas.report.figure import figure
from nas.run import FinishedRun, origin
from nas.space import Vector, load_space, parse_vector
from nas.stages.train import inherited_loss

SPACE, VOCABULARY, WINDOWS = "small", 8192, 256
RULES = ("sliced", "pooled", "separate")  # models trained alone are made in the comparison of the first
MORE = [(rule, seed) for rule in RULES[:2] for seed in (1, 2)]  # supernets, for the largest vector's gap
TRAIN = (
    *("steps=800", "batch=32", "learning_rate=2e-3", "largest_share=0.25", "compile=true"),
    *("log_every=100", "validate_every=1000", "checkpoint_every=200", "validation_windows=64"),
)
LOW = (
    *("steps=3000", "batch=16", "learning_rate=5e-4", "largest_share=0.25", "compile=true"),
    *("log_every=500", "validate_every=10000", "checkpoint_every=1000", "validation_windows=64"),
)
COMPARE = ("vectors=24", "equal_total=12", f"validation_windows={WINDOWS}", "further.steps=200")
COMPARE_LOW = ("vectors=8", "equal_total=0", f"validation_windows={WINDOWS}", "further.steps=750", "alone.vectors=8")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "fidelity"


def run(text: str, out: Path) -> None:
    """Makes whatever of the study is not made yet, and writes its tables."""
    for rule in RULES:
        train(text, rule, 0, TRAIN)
        alone = () if rule == RULES[0] else ("alone.vectors=0",)
        write_csv(out / f"{rule}.csv", compared(text, rule, f"{rule}-0", (*COMPARE, *alone)))
    for rule, seed in MORE:
        train(text, rule, seed, TRAIN)
    largest = load_space(SPACE).largest
    losses = [losses_of(text, f"{rule}-{seed}", [largest])[0] for rule, seed in MORE]
    table = pd.DataFrame(MORE, columns=["rule", "seed"]).assign(loss_nats=losses, **origin())
    write_csv(out / "largest.csv", table)

    for rule in RULES[:2]:
        train(text, rule, 0, LOW, "low-")
    low = compared(text, RULES[0], f"low-{RULES[0]}-0", COMPARE_LOW)
    write_csv(out / f"low_{RULES[0]}.csv", low)
    others = low[low["kind"] == "inherited"].assign(rule=RULES[1], **origin())
    others["loss_nats"] = losses_of(text, f"low-{RULES[1]}-0", list(map(parse_vector, others["vector"])))
    write_csv(out / f"low_{RULES[1]}.csv", others)


def train(text: str, rule: str, seed: int, options: tuple[str, ...], prefix: str = "") -> None:
    """Trains a supernet, unless it is trained already."""
    keys = [f"train.{option}" for option in (*options, f"sharing={rule}", f"seed={seed}")]
    finished("train", f"{prefix}{rule}-{seed}", f"space={SPACE}", "data=text", f"data.path={text}", *keys)


def compared(text: str, rule: str, supernet: str, options: tuple[str, ...]) -> pd.DataFrame:
    """What `nas fidelity` measured of a supernet, by the name of its run."""
    words = (f"supernet=runs/train/{supernet}", "data=text", f"data.path={text}", *options)
    return pd.read_csv(finished("fidelity", supernet, *words).path / "measurements.csv").assign(rule=rule)


def losses_of(text: str, name: str, vectors: list[Vector]) -> list[float]:
    """Inherited losses of a supernet's vectors."""
    data = prepare_tokens(TextCorpus(text), None, VOCABULARY, Path("runs/cache"))
    return inherited_loss(FinishedRun(Path("runs/train", name), "train"), data, WINDOWS, Path("runs")).of(vectors)


def draw() -> None:
    """Writes fidelity.png, agreement.csv and gaps.csv beside the measurements, and prints the tables.

    Their columns of origin are those of the measurements; ``computed_commit`` and ``computed_date`` are of this.
    """
    measured = {rule: pd.read_csv(DOCS / f"{rule}.csv") for rule in RULES}
    low = {rule: pd.read_csv(DOCS / f"low_{rule}.csv") for rule in RULES[:2]}
    low[RULES[1]] = pd.concat([low[RULES[1]], low[RULES[0]].query("kind == 'alone'")])  # which no supernet touched
    everything = {f"{rule}, learning rate 2e-3": rows for rule, rows in measured.items()}
    everything |= {f"{rule}, learning rate 5e-4": rows for rule, rows in low.items()}
    computed = {f"computed_{name}": value for name, value in origin().items() if name in ("commit", "date")}
    tables = {title: agreement(rows).assign(**made(rows), **computed) for title, rows in everything.items()}
    with figure(DOCS / "fidelity", width=12.6, height=3.7 * len(everything)) as drawing:
        panels = np.ravel([drawing.subfigures(len(everything), 1)])
        for panel, (title, rows) in zip(panels, everything.items(), strict=True):
            draw_fidelity(panel, rows, tables[title])
            panel.suptitle(title, fontsize=9)
    table = pd.concat(tables, names=["setting"]).reset_index("setting")
    write_csv(DOCS / "agreement.csv", table)
    print(table.round(3).to_string(index=False))

    at_largest = [rows[rows["kind"] == "inherited"].nlargest(1, "total").assign(seed=0) for rows in measured.values()]
    alone = measured[RULES[0]].query("kind == 'alone'")
    gaps = pd.concat([*at_largest, pd.read_csv(DOCS / "largest.csv")])[["rule", "seed", "loss_nats"]]
    plain = alone[alone["total"] == alone["total"].max()].set_index("seed")["loss_nats"]
    gaps["plain_loss_nats"] = gaps["seed"].map(plain)
    gaps["gap_percent"] = 100 * (gaps["loss_nats"] / gaps["plain_loss_nats"] - 1)
    gaps = gaps.assign(**made(alone), **computed)
    write_csv(DOCS / "gaps.csv", gaps.sort_values(["rule", "seed"]))
    print(gaps.round(4).to_string(index=False))
    print(gaps.groupby("rule")["gap_percent"].mean().round(2).to_string())


def made(measurements: pd.DataFrame) -> dict[str, str]:
    """Where and when measurements were made, by the values of their columns."""
    return {name: "; ".join(measurements[name].dropna().unique()) for name in origin()}


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train, compare, and write OUT/*.csv")
    running.add_argument("text", help="data.path")
    running.add_argument("out", type=Path)
    commands.add_parser("draw", help="figure and tables from the CSVs in docs/fidelity, which it rewrites")
    given = parser.parse_args()
    draw() if given.command == "draw" else run(given.text, given.out)
