"""nas measure: times the layers of a space on this machine, and checks the predictor against whole models."""

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from nas.config import LatencyParts, Measure
from nas.console import say
from nas.errors import UserError
from nas.files import write_atomically, write_json
from nas.latency.device import DEVICE, Device, device_folders, this_device
from nas.latency.measure import grid_for, measure, pool_bytes, predict_check, summarise_check
from nas.latency.model import Workload, resolve_workload
from nas.latency.table import CHECK, META, TABLE, TableLatency, layer_shape
from nas.run import FinishedRun, find_runs, git_state, now, start_run
from nas.space import SearchSpace, load_space


def run(config: Measure, path: Path) -> None:
    """Measures into ``path``."""
    space = load_space(config.space)
    if config.device != "this":
        raise UserError(f"device is '{config.device}' but only the machine at hand can be measured; use device=this")
    device = this_device()
    if config.publish:
        Path(config.publish).mkdir(parents=True, exist_ok=True)  # fails before anything is timed in vain
    table = measure_space(config, space, device, resolve_workload(config.workload, space.shape, device), path)
    if config.publish:
        home = Path(config.publish) / device.slug
        folder = home / f"{space.name}-{table.meta['dtype']}-{table.meta['runtime']}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in (TABLE, META, CHECK):
            shutil.copy(path / name, folder / name)
        if not (home / DEVICE).is_file():
            write_json(home / DEVICE, device.description())
        say(f"Copied the table to {folder}")


def find_table(runs_dir: Path, device: Device, space: SearchSpace, workload: Workload) -> TableLatency | None:
    """A measured table that covers a workload: of this user's newest fitting run, else one that ships."""

    def tables() -> Iterator[TableLatency]:
        own = (run for run in find_runs(runs_dir, "measure") if run.config.get("device") == device.slug)
        yield from map(table_of, own)
        metas = (folder.glob(f"*/{META}") for folder in device_folders(device.slug))
        yield from (TableLatency(meta.parent) for meta in sorted(itertools.chain(*metas)))

    return next((table for table in tables() if table.fits(device.slug, space, workload)), None)


def table_of(run: FinishedRun) -> TableLatency:
    """The table of a measure run.

    Raises:
        UserError: Its files are missing, changed or corrupt.
    """
    for name in (TABLE, META, CHECK):
        run.artifact(name)
    return TableLatency(run.path)


def measure_space(
    config: LatencyParts, space: SearchSpace, device: Device, workload: Workload, path: Path
) -> TableLatency:
    """Times the grid around ``workload`` and whole models, and prints how far the predictor is off.

    Args:
        config: A `Measure` or a `Search`.
        space: Its layer shape and groups are timed.
        device: The device at hand.
        workload: Is a point of the grid.
        path: The run directory.

    Raises:
        UserError: The grid is beyond the space's context, or does not fit into memory.
    """
    grid = grid_for(config.measure, workload)
    limit = space.shape.max_position_embeddings
    if max(*grid.contexts, *grid.prompts) > limit:
        raise UserError(f"the grid reaches beyond the space's context of {limit}; lower measure.contexts or .prompts")
    needed = pool_bytes(space, grid, workload)
    if needed > device.memory_bytes:
        raise UserError(
            f"timing {space.name} ({workload}) takes at least {needed / 2**30:.0f} GiB but {device.name} has "
            f"{device.memory_bytes / 2**30:.0f}; lower workload.batch or .context, or take a smaller space"
        )
    asked = {
        "space": {"name": space.name, **space.to_dict()},
        "device": device.slug,
        "workload": dataclasses.asdict(workload),
        "measure": dataclasses.asdict(config.measure),
        "check": config.check,
    }
    with start_run(path, "measure", asked, {"measure": config.measure.seed}) as run:
        say(f"Timing the layers of {space.name} on {device.name} ({workload}) in {path}")
        torch_device = torch.device("cuda" if device.is_gpu else "cpu")
        meta = {
            "date": now(),
            "device": dataclasses.asdict(device),
            "shape": layer_shape(space.shape),
            "dtype": workload.dtype,
            "runtime": workload.runtime,
            "workload": dataclasses.asdict(workload),
            "measure": dataclasses.asdict(config.measure),
            "torch": torch.__version__,
            "git": git_state(),
        }
        try:
            table, wholes = measure(space, grid, workload, config.measure, config.check, torch_device)
        except torch.OutOfMemoryError:
            raise UserError(
                f"the grid does not fit into the memory of {device.name}; lower workload.batch or .context"
            ) from None
        write_atomically(path / TABLE, lambda file: table.to_csv(file, index=False))
        write_json(path / META, meta)
        check = predict_check(wholes, TableLatency(path), workload)
        write_atomically(path / CHECK, lambda file: check.to_csv(file, index=False))
        write_json(path / META, meta | {"check": summarise_check(check)})
        _say_check(check)
        run.finish()
    return TableLatency(path)


def _say_check(check: pd.DataFrame) -> None:
    for phase, error in summarise_check(check).items():
        say(
            f"  predicted against {error['n']:.0f} whole models, {phase}: mean error {error['mape']:.1%}, "
            f"worst {error['worst']:.1%}, Kendall τ {error['kendall_tau']:.2f}"
        )
