"""The latency model of a search: named by the user, found among what was measured, measured now, or estimated."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nas import console
from nas.config import Search
from nas.errors import UserError
from nas.files import value_hash
from nas.latency import Device, Predictor, Workload
from nas.latency.device import device_folders
from nas.latency.estimate import RooflineLatency
from nas.latency.memory import batches_of
from nas.latency.predictor import MAX, STEP_REVISION
from nas.latency.table import META, TableLatency
from nas.run import FinishedRun, begun_otherwise, find_or_make, find_runs, recorded_config
from nas.space import SearchSpace
from nas.stages.measure import measure_space, table_of


def find_latency(config: Search, path: Path, space: SearchSpace, device: Device, workload: Workload) -> Predictor:
    """Named, as an interrupted search was begun, found, measured now where the device is at hand, else estimated."""
    runs_dir = Path(config.runs_dir)
    if config.latency:
        named = table_of(FinishedRun(Path(config.latency), "measure"))
        if _covers(named, device, space, workload):
            return named
        raise UserError(
            f"latency {config.latency} does not cover {space.name} on {device.slug} at {workload}; measure that"
        )
    begun, tables = recorded_config(path), fitting_tables(runs_dir, device, space, workload)
    if begun and begun["latency_table"]:
        same = (table for table in tables if table.digest == begun["latency_table"])
        if found := next(same, None):
            return found
        raise begun_otherwise(path, "space, device, workload or latency table")
    if not begun and (found := next(tables, None)):
        return found
    if begun or config.device != "this":
        return RooflineLatency(device, space.shape, workload.dtype)
    measured = _measured(config, space, device, workload)
    if _covers(measured, device, space, workload):
        return measured
    raise UserError(
        f"{measured.folder} was measured, but memory ended before it covered {space.name} at {workload}; lower "
        f"workload.{'memory_gib' if workload.batch == MAX else 'batch or .context'}"
    )


def _covers(table: TableLatency, device: Device, space: SearchSpace, workload: Workload) -> bool:
    return table.fits(device.slug, space, workload, batches_of(space, device, workload))


def _measured(config: Search, space: SearchSpace, device: Device, workload: Workload) -> TableLatency:
    """The table that a search measures first, if none before it or another beside it has measured the same."""
    console.print("No measured table covers this space, device and workload: measuring first")
    decisive: list[Any] = [space.to_dict(), device.slug, dataclasses.asdict(workload)]
    decisive += [dataclasses.asdict(config.measure), config.check, STEP_REVISION[workload.runtime]]
    path = Path(config.runs_dir) / "measure" / f"{space.name}-{device.slug}-{value_hash(decisive)}"
    make = partial(measure_space, config, space, device, workload, path)
    return table_of(find_or_make(path, "measure", make))


def fitting_tables(runs_dir: Path, device: Device, space: SearchSpace, workload: Workload) -> Iterator[TableLatency]:
    """Measured tables that cover a workload.

    Those of the present decode step come first; among them those measured for this workload, as others may have to
    interpolate; then this user's runs, newest first, before those that ship. Unusable ones are skipped with a warning.
    """
    own = [run for run in find_runs(runs_dir, "measure") if run.config.get("device") == device.slug]
    published = [meta.parent for folder in device_folders(device.slug) for meta in sorted(folder.glob(f"*/{META}"))]
    tables = []
    for load in [*(partial(table_of, run) for run in own), *(partial(TableLatency, folder) for folder in published)]:
        try:
            table = load()
            table.check()
        except UserError as error:
            console.warn(f"Passing over a latency table: {error}")
            continue
        tables.append(table)
    wanted = dataclasses.asdict(workload)
    covering = [table for table in tables if _covers(table, device, space, workload)]
    yield from sorted(covering, key=lambda table: (not table.is_current, table.meta.get("workload") != wanted))
