"""Whether two GPUs train as one: the losses of one process, of DDP and of FSDP2 on the same batches, step by step.

    python scripts/distributed_check.py TEXT OUT.csv      TEXT as data.path; runs in runs/train/distributed-*

One row per step: ``step, one, ddp, fsdp`` (nats per token, fp32), and the machine. Prints the largest differences.
"""

import json
from pathlib import Path

import pandas as pd
from shared import argument_parser, finished

from nas.run import origin

TRAIN = ("steps=20", "batch=16", "learning_rate=5e-4", "precision=fp32", "log_every=1", "validation_windows=8")
WAYS = {"one": (1, "ddp"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}  # processes, train.parallel


def losses(way: str, text: str) -> pd.Series:
    """The loss of each step, trained in one way."""
    processes, parallel = WAYS[way]
    options = [f"train.{option}" for option in (*TRAIN, f"parallel={parallel}")]
    words = ("space=small", "data=text", f"data.path={text}", *options)
    run = finished("train", f"distributed-{way}", *words, processes=processes)
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return pd.Series({line["step"]: line["loss_nats"] for line in lines if "loss_nats" in line}, name=way)


def main(text: str, out: Path) -> None:
    """Trains in all ways and writes the table."""
    table = pd.concat([losses(way, text) for way in WAYS], axis=1)
    made = origin()
    table.rename_axis("step").assign(**made | {"device": f"2 x {made['device']}"}).to_csv(out)
    print({way: float((table[way] - table["one"]).abs().max()) for way in WAYS})


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("text", help="data.path")
    parser.add_argument("csv", type=Path, help="written")
    given = parser.parse_args()
    main(given.text, given.csv)
