"""nas measure: times the layers of a space on this machine, and checks the predictor against whole models."""

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from nas.config import LatencyParts, Measure
from nas.console import complain, say
from nas.errors import AlreadyFinishedError, UserError
from nas.files import write_atomically, write_json
from nas.latency.device import DEVICE, Device, device_folders, this_device
from nas.latency.measure import grid_for, measure, pool_bytes, predict_check, summarise_check
from nas.latency.model import Workload, resolve_workload
from nas.latency.table import CHECK, META, TABLE, TableLatency, layer_shape
from nas.model.pretrained import resolve_space
from nas.run import FinishedRun, find_runs, git_state, now, start_run
from nas.space import SearchSpace


def run(config: Measure, path: Path) -> None:
    """Measures into ``path``."""
    space = resolve_space(config.space)
    if config.device != "this":
        raise UserError(f"device is '{config.device}' but only the machine at hand can be measured; use device=this")
    device = this_device()
    if config.publish:
        Path(config.publish).mkdir(parents=True, exist_ok=True)  # fails before anything is timed in vain
    workload = resolve_workload(config.workload, space.shape, device)
    try:
        table = measure_space(config, space, device, workload, path)
    except AlreadyFinishedError:
        if not config.publish:
            raise
        table = table_of(FinishedRun(path, "measure"))  # measured before; publishing it is what is left to do
    if config.publish:
        _publish(table, space, device, Path(config.publish))


def _publish(table: TableLatency, space: SearchSpace, device: Device, root: Path) -> None:
    folder = root / device.slug / f"{space.name}-{table.meta['dtype']}-{table.meta['runtime']}"
    (folder / META).unlink(missing_ok=True)  # a table without its meaning is none: nothing half-copied is ever read
    for name in (TABLE, CHECK, META):
        write_atomically(folder / name, partial(shutil.copy, table.folder / name))
    if not any((known / DEVICE).is_file() for known in device_folders(device.slug)):
        write_json(root / device.slug / DEVICE, device.description())
    say(f"Copied the table to {folder}")


def fitting_tables(runs_dir: Path, device: Device, space: SearchSpace, workload: Workload) -> Iterator[TableLatency]:
    """Measured tables that cover a workload: of this user's runs, newest first, then those that ship.

    Unusable ones are passed over with a warning.
    """
    own = [run for run in find_runs(runs_dir, "measure") if run.config.get("device") == device.slug]
    published = [meta.parent for folder in device_folders(device.slug) for meta in sorted(folder.glob(f"*/{META}"))]
    for load in [*(partial(table_of, run) for run in own), *(partial(TableLatency, folder) for folder in published)]:
        try:
            table = load()
            table.check()
        except UserError as error:
            complain(f"Passing over a latency table: {error}")
            continue
        if table.fits(device.slug, space, workload):
            yield table


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
            "check": {},
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
        tau = f", Kendall τ {error['kendall_tau']:.2f}" if "kendall_tau" in error else ""
        say(
            f"  predicted against {error['n']:.0f} whole models, {phase}: mean error {error['mape']:.1%}, "
            f"worst {error['worst']:.1%}{tau}"
        )
