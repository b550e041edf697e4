"""What the scripts share: their arguments, commands of the product, CSVs that grow, tables of pages, and the GPU."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nas import shipped
from nas.files import write_atomically, write_csv
from nas.hardware import nvml_facts
from nas.run import FinishedRun, origin


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def finished(stage: str, name: str, *overrides: str, runs: Path = Path("runs"), processes: int = 1) -> FinishedRun:
    """A run of the product; its command is run, or goes on, unless it is finished already."""
    run = runs / stage / name
    if not (run / "complete.json").is_file():
        launch = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
        command = [sys.executable, "-m", *launch, "nas", stage, f"name={name}", f"runs_dir={runs}", *overrides]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
    return FinishedRun(run, stage)


def add_rows(file: Path, *rows: Mapping[str, Any]) -> None:
    """Adds rows to a CSV, which need not exist; those that are in it stay as they are written."""
    before = [pd.read_csv(file, dtype=str, keep_default_na=False)] if file.is_file() else []
    write_csv(file, pd.concat([*before, pd.DataFrame(rows)]))


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]], alignment: str = "") -> str:
    """A table in Markdown; ``alignment`` has an ``l`` or ``r`` for every column, by default all ``l``."""
    rules = ["---:" if side == "r" else "---" for side in alignment.ljust(len(heads))]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, rules, *rows))


def fill_page(page: Path, **texts: str) -> None:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->`` on a page, for every name."""
    content = page.read_text(encoding="utf-8")
    for name, text in texts.items():
        content = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", f"{text}\n", content, flags=re.DOTALL)
    write_atomically(page, lambda path: path.write_text(content, encoding="utf-8"))


def gpu_uuid() -> str:
    """That of the first GPU, as PyTorch writes it."""
    return str(torch.cuda.get_device_properties(0).uuid)


def gpu_origin() -> dict[str, Any]:
    """The columns of `origin`, and the GPU's driver."""
    return {"driver": nvml_facts(gpu_uuid()).get("driver")} | origin()


def shipped_folder(device: str, space: str, runtime: str) -> Path:
    """That of the table that ships for a device, by its name in PyTorch."""
    return shipped("latency_models") / "-".join(device.lower().split()) / f"{space}-bf16-{runtime}"
