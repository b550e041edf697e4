"""Whether two GPUs train as one: the losses of one process, of DDP and of FSDP2 on the same batches, step by step.

    python scripts/distributed_check.py TEXT OUT.csv      TEXT as data.path; runs in runs/train/distributed-*

One row per step: ``step, one, ddp, fsdp`` (nats per token, fp32), and the machine. Prints the largest differences.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

from nas.run import origin

TRAIN = ("steps=20", "batch=16", "learning_rate=5e-4", "precision=fp32", "log_every=1", "validation_windows=8")
WAYS = {"one": (), "ddp": ("--nproc-per-node", "2"), "fsdp": ("--nproc-per-node", "2")}


def losses(way: str, text: str) -> pd.Series:
    """The loss of each step, trained in one way."""
    name = f"distributed-{way}"
    launch = ["-m", "torch.distributed.run", *WAYS[way]] if WAYS[way] else []
    parallel = ["train.parallel=" + way] if WAYS[way] else []
    train = [f"train.{option}" for option in TRAIN]
    command = ["-m", "nas", "train", "space=small", f"name={name}", "data=text", f"data.path={text}", *train, *parallel]
    subprocess.run([sys.executable, *launch, *command], check=True)
    lines = map(json.loads, Path("runs/train", name, "metrics.jsonl").read_text().splitlines())
    return pd.Series({line["step"]: line["loss_nats"] for line in lines if "loss_nats" in line}, name=way)


def main(text: str, out: Path) -> None:
    """Trains in all ways and writes the table."""
    table = pd.concat([losses(way, text) for way in WAYS], axis=1)
    made = origin()
    table.rename_axis("step").assign(**made | {"device": f"2 x {made['device']}"}).to_csv(out)
    print({way: float((table[way] - table["one"]).abs().max()) for way in WAYS})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="data.path")
    parser.add_argument("csv", type=Path, help="written")
    given = parser.parse_args()
    main(given.text, given.csv)
