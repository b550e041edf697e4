"""How much of a plain model's quality the largest vector keeps, by sharing rule, recipe and schedule.

Trains plain models of the largest vector, and supernets in many ways, for the same steps on the same batches, and adds
a line for each to a CSV: the validation losses of the uniform vectors. Every line is a whole training, so this is for a
GPU; lines that are there already are kept, and several processes can share the lines out.

    python scripts/recipe_study.py run TEXT OUT.csv [INDEX COUNT]    TEXT as data.path; every COUNT-th line
    python scripts/recipe_study.py show                              docs/fidelity/recipes.csv with gaps, as a table
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from shared import add_rows, argument_parser
from torch import Tensor

from nas.config import SupernetConfig, TrainConfig
from nas.data import TokenData, prepare_tokens, validation_windows
from nas.data.corpora import TextCorpus
from nas.model import Decoder, Supernet
from nas.model.sharing import SHARING_RULES, Pooled, pooling
from nas.quality import mean_loss, vector_losses
from nas.run import Run, origin
from nas.space import load_space
from nas.training.loop import fit, training_device
from nas.training.recipes import supernet_loss, text_loss

TABLE = Path(__file__).resolve().parent.parent / "docs" / "fidelity" / "recipes.csv"
SPACE = load_space("small")
COMMON: dict[str, Any] = {"compile": True, "log_every": 100, "validate_every": 10**9, "checkpoint_every": 10**9}
FEW_ROWS: dict[str, Any] = {"steps": 1500, "batch": 16, "learning_rate": 2e-3}
MANY_ROWS: dict[str, Any] = {"steps": 800, "batch": 32, "learning_rate": 1e-3}
FASTER = MANY_ROWS | {"learning_rate": 2e-3}
QUARTER: dict[str, Any] = {"largest_share": 0.25}
LINES: list[tuple[str, dict[str, Any]]] = [
    ("plain", FEW_ROWS),
    ("plain", FEW_ROWS | {"seed": 1}),
    ("plain", FEW_ROWS | {"learning_rate": 4e-3}),
    ("sliced", FEW_ROWS),
    ("sliced", FEW_ROWS | QUARTER),
    ("sliced", FEW_ROWS | QUARTER | {"seed": 1}),
    ("sliced", FEW_ROWS | {"largest_share": 0.5}),
    ("sliced", FEW_ROWS | {"largest_first": 0.3}),
    ("sliced", FEW_ROWS | {"recipe": "sandwich", "distillation_weight": 0.0}),
    ("pooled", FEW_ROWS | QUARTER),
    ("plain", MANY_ROWS),
    ("sliced", MANY_ROWS | QUARTER),
    ("residual", MANY_ROWS | QUARTER),
    ("sliced", MANY_ROWS | QUARTER | {"largest_first": 0.5}),
    ("pooled", MANY_ROWS | QUARTER | {"largest_first": 0.5}),
    ("pooled, scaled", MANY_ROWS | QUARTER | {"largest_first": 0.5}),
    ("separate", MANY_ROWS | QUARTER | {"largest_first": 0.5}),
    ("residual", MANY_ROWS | QUARTER | {"largest_first": 0.5}),
    ("residual", MANY_ROWS | QUARTER | {"largest_first": 0.7}),
    ("plain", FASTER),
    ("sliced", FASTER | QUARTER),
    *(("sliced", FASTER | QUARTER | {"largest_first": 0.3, "seed": seed}) for seed in range(3)),
    *(("sliced", FASTER | QUARTER | {"largest_first": 0.5, "seed": seed}) for seed in range(3)),
]
VARIED = ("batch", "steps", "learning_rate", "seed", "recipe", "largest_share", "largest_first", "distillation_weight")


class ScaledPooled(Pooled):
    """Means times the root of the number of heads: a mean of independent heads is smaller than a head."""

    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        return super().mixture(choices, groups) * math.sqrt(max(choices) / groups)


class Residual(Pooled):
    """Means, and for every smaller choice heads of its own on top, which start at zero."""

    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        own = [torch.eye(choice) if choice == groups else torch.zeros(groups, choice) for choice in choices[:-1]]
        return torch.cat((pooling(max(choices), groups), *own), dim=1)

    def from_largest(self, choices: Sequence[int]) -> Tensor:
        return torch.eye(sum(choices), max(choices))


SHARING_RULES["pooled, scaled"], SHARING_RULES["residual"] = ScaledPooled(), Residual()


def run(text: str, out: Path, index: int = 0, count: int = 1) -> None:
    """Trains what ``out`` lacks of its part, and adds it there line by line."""
    data = prepare_tokens(TextCorpus(text), None, SPACE.shape.vocab_size, Path("runs/cache"))
    for sharing, options in LINES[index::count]:
        line = described(sharing, options)
        table = pd.read_csv(out) if out.is_file() else pd.DataFrame(columns=list(line))
        if line not in table[list(line)].astype(object).replace({np.nan: None}).to_dict("records"):
            line |= trained(sharing, COMMON | options, data) | origin()
            add_rows(out, line)
            print(line, flush=True)


def described(sharing: str, options: dict[str, Any]) -> dict[str, Any]:
    """The columns that say how a line's model is trained; what does not concern a plain model is empty."""
    config = vars(TrainConfig(**options) if sharing == "plain" else SupernetConfig(**options))
    return {"sharing": sharing, **{key: config.get(key) for key in VARIED}}


def trained(sharing: str, options: dict[str, Any], data: TokenData) -> dict[str, Any]:
    """The losses of the uniform vectors after one training; of a plain model only the largest's."""
    length = SPACE.shape.max_position_embeddings
    windows = validation_windows(data.validation, 256, length).to(training_device())
    where = Run(Path("runs") / "recipes" / str(os.getpid()))
    where.path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    if sharing == "plain":
        plain, plainly = Decoder(SPACE.shape, SPACE.largest), TrainConfig(**options)
        plain.initialise(generator)
        loss_at = text_loss(data.train, plainly, length)
        return fit(plain, loss_at, plainly, where, lambda: {"loss_nats_4": mean_loss(plain, windows)})
    config = SupernetConfig(sharing=sharing, **options)
    supernet = Supernet(SPACE, sharing)
    supernet.initialise(generator)

    def validate() -> dict[str, float]:
        uniform = SPACE.uniform_vectors()[::-1]
        losses = vector_losses(supernet, uniform, windows)
        return {f"loss_nats_{vector[0]}": loss for vector, loss in zip(uniform, losses, strict=True)}

    return fit(supernet, supernet_loss(SPACE, data.train, config, length), config, where, validate)


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the largest vector's distance to the plain model of the same steps, batches and seed."""
    alike = ["batch", "steps", "learning_rate", "seed"]
    plain = table.loc[table["sharing"] == "plain", [*alike, "loss_nats_4"]]
    table = table.merge(plain, how="left", on=alike, suffixes=("", "_plain"))
    table["gap_percent"] = 100 * (table["loss_nats_4"] / table.pop("loss_nats_4_plain") - 1)
    return table


def show() -> None:
    """Prints the table with gaps."""
    print(gaps(pd.read_csv(TABLE)).drop(columns=list(origin())).round(4).to_string(index=False))


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train, and add lines to a CSV")
    running.add_argument("text", help="data.path")
    running.add_argument("csv", type=Path)
    running.add_argument("share", type=int, nargs="*", metavar="INDEX COUNT", help="only every COUNT-th line")
    commands.add_parser("show", help="print the table of docs/fidelity/recipes.csv, with gaps")
    given = parser.parse_args()
    show() if given.command == "show" else run(given.text, given.csv, *given.share)
