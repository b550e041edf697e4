"""nas measure: times the layers of a space on this machine, and checks the predictor against end-to-end models.

table.csv      the times; latency.json says what they mean
check.csv      end-to-end models, predicted and measured; check.png and .svg draw them
energy.csv     power of decode steps, where NVML tells
samples.csv    every single sample, by which an interrupted measurement goes on
"""

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nas import console
from nas.config import LatencyParts, Measure
from nas.errors import AlreadyFinishedError, UserError
from nas.files import write_atomically, write_json
from nas.latency.accuracy import CHECK, lasting_load, predict_end_to_end, summarise_check
from nas.latency.device import DEVICE, Device, device_folders, this_device
from nas.latency.energy import ENERGY
from nas.latency.measurement import Measured, measure
from nas.latency.memory import batches_of, check_memory
from nas.latency.points import check_shapes, grid_for
from nas.latency.predictor import STEP_REVISION, Workload, resolve_workload
from nas.latency.samples import SAMPLES
from nas.latency.table import META, TABLE, TableLatency, layer_shape
from nas.model.pretrained import resolve_space
from nas.provenance import git_state, now
from nas.report.figure import figure
from nas.report.predicted import draw_check
from nas.run import FinishedRun, start_run
from nas.space import SearchSpace

_FIGURE = "check"


def run(config: Measure, path: Path) -> None:
    """Measures into ``path``."""
    space = resolve_space(config.space)
    if config.device != "this":
        raise UserError(f"device is '{config.device}' but only the machine at hand can be measured; use device=this")
    device = this_device()
    if config.publish:
        Path(config.publish).mkdir(parents=True, exist_ok=True)  # fails before anything is timed in vain
    workload = resolve_workload(config.workload, space.shape, device)
    check_memory(space, device, workload)
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
    for name in (TABLE, CHECK, ENERGY, f"{_FIGURE}.png", META):
        (folder / name).unlink(missing_ok=True)
        if (table.folder / name).is_file():
            write_atomically(folder / name, partial(shutil.copy, table.folder / name))
    if not any((known / DEVICE).is_file() for known in device_folders(device.slug)):
        write_json(root / device.slug / DEVICE, device.description())
    console.print(f"Copied the table to {folder}")


def table_of(run: FinishedRun) -> TableLatency:
    """The table of a measure run, whose files must be unchanged."""
    for name in (TABLE, META, CHECK, *({ENERGY} & run.artifacts)):
        run.artifact(name)
    return TableLatency(run.path)


def measure_space(
    config: LatencyParts, space: SearchSpace, device: Device, workload: Workload, path: Path
) -> TableLatency:
    """Times the grid around ``workload`` and end-to-end models, and prints how far the predictor is off."""
    batches = batches_of(space, device, workload)
    grid = grid_for(config.measure, workload, batches, space.shape.max_position_embeddings)
    shapes = check_shapes(config.measure, grid, workload, batches)
    limit = space.shape.max_position_embeddings
    if max(*grid.contexts, *grid.prompts, *(length for _, _, length in shapes)) > limit:
        raise UserError(
            f"the grid reaches beyond the space's context of {limit}; lower measure.contexts, .prompts or .check_at"
        )
    energy_batches = config.measure.energy_batches or ()
    if any(batch > grid.batches[-1] for batch in energy_batches):
        most = grid.batches[-1]
        raise UserError(f"measure.energy_batches has {max(energy_batches)} but the grid's largest batch is {most}")
    if outside := [at for at in config.measure.check_at or () if not grid.surrounds(*at)]:
        raise UserError(
            f"measure.check_at has {outside[0]}, which the grid of batches {list(grid.batches)} and contexts "
            f"{list(grid.contexts)} does not surround; widen measure.batches or .contexts"
        )
    shared: dict[str, Any] = {"workload": dataclasses.asdict(workload), "measure": dataclasses.asdict(config.measure)}
    shared["step_revision"] = STEP_REVISION[workload.runtime]
    identity = {"space": {"name": space.name, **space.to_dict()}, "device": device.slug, "check": config.check}
    identity |= shared
    with start_run(path, "measure", identity, {"measure": config.measure.seed}) as run:
        console.print(f"Timing the layers of {space.name} on {device.name} ({workload}) in {path}")
        found = measure(space, grid, shapes, workload, config.measure, config.check, device, path / SAMPLES)
        _print_metadata(found)
        meta: dict[str, Any] = {
            "date": now(),
            "device": dataclasses.asdict(device),
            "shape": layer_shape(space.shape),
            "dtype": workload.dtype,
            "runtime": workload.runtime,
            "torch": torch.__version__,
            "git": git_state(),
            "check": [],
            **shared,
            **found.metadata,
        }
        title = f"{space.name} on {device.name}, {workload.dtype}, {workload.runtime}, {meta['date'][:10]}"
        _write(path, found, meta, space.shape.num_hidden_layers, title)
        run.finish()
    return TableLatency(path)


def _write(path: Path, found: Measured, meta: dict[str, Any], layers: int, title: str) -> None:
    write_atomically(path / TABLE, partial(found.table.to_csv, index=False))
    if found.energy is not None:
        write_atomically(path / ENERGY, partial(found.energy.to_csv, index=False))
    write_json(path / META, meta)
    predictor = TableLatency(path)
    check = predict_end_to_end(found.end_to_end_ms, predictor)
    write_atomically(path / CHECK, partial(check.to_csv, index=False))
    results: dict[str, Any] = {"check": summarise_check(check)}
    if found.energy is not None:
        results["lasting_load"] = lasting_load(found.energy, found.table, predictor, layers)
    write_json(path / META, meta | results)
    if not check.empty:
        with figure(path / _FIGURE, "Predicted and measured models", title) as drawing:
            draw_check(drawing, check)
    _print_check(check)


def _print_metadata(found: Measured) -> None:
    if (drift := found.metadata.get("drift")) and drift["segments_beyond"]:
        console.print(
            f"  the machine drifted by {drift['worst']:.1%} (more than {drift['tolerance']:.0%} in "
            f"{drift['segments_beyond']} of {drift['segments']} segments); {drift['points_affected']} points were "
            f"timed again, of which {drift['points_left_unsteady']} never met it steady"
        )
    if lost := int((found.table["n"] == 0).sum()):
        console.print(f"  {lost} of {len(found.table)} points did not fit into memory and are marked so")


def _print_check(check: pd.DataFrame) -> None:
    for error in summarise_check(check):
        tau = f", Kendall τ {error['kendall_tau']:.3f}" if "kendall_tau" in error else ""
        console.print(
            f"  predicted against {error['n']} end-to-end models, {error['phase']} at batch {error['batch']} and "
            f"{error['length']} tokens: mean error {error['mape']:.2%}, worst {error['worst']:.2%}{tau}"
        )
