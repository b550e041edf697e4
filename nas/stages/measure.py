"""nas measure: times the layers of a space on this machine, and checks the predictor against end-to-end models.

table.csv      the times; latency.json says what they mean
check.csv      end-to-end models, predicted and measured; check.png and .svg draw them
energy.csv     power of decode steps, where NVML tells
samples.csv    every single sample, by which an interrupted measurement goes on

`find_latency` is what a search takes of these, or measures itself.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nas import console
from nas.config import LatencyParts, Measure, Search
from nas.errors import AlreadyFinishedError, UserError
from nas.files import value_hash, write_atomically, write_csv, write_json
from nas.latency import Device, Predictor, Workload, resolve_workload, this_device
from nas.latency.accuracy import CHECK, lasting_load, predict_end_to_end, summarise_check
from nas.latency.device import DEVICE, device_folders
from nas.latency.energy import ENERGY
from nas.latency.estimate import RooflineLatency
from nas.latency.measurement import Measured, check_shapes, grid_for, measure
from nas.latency.memory import batches_of, check_serving_memory
from nas.latency.predictor import MAX, STEP_REVISION
from nas.latency.table import META, TABLE, TableLatency, layer_shape
from nas.latency.timing import SAMPLES
from nas.model.pretrained import resolve_space
from nas.report.agreement import draw_check
from nas.report.figure import figure
from nas.run import FinishedRun, find_or_make, find_runs, git_state, now, start_run
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
    check_serving_memory(space, device, workload)
    try:
        measure_space(config, space, device, workload, path)
    except AlreadyFinishedError:
        if not config.publish:  # which is all that is left to do then
            raise
    if config.publish:
        _publish(table_of(FinishedRun(path, "measure")), space, device, Path(config.publish))


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
    for name in (TABLE, META, CHECK, *({ENERGY} & run.artifacts.keys())):
        run.artifact(name)
    return TableLatency(run.path)


def measure_space(config: LatencyParts, space: SearchSpace, device: Device, workload: Workload, path: Path) -> None:
    """Times the grid around ``workload`` and end-to-end models, and prints how far the predictor is off."""
    options, limit = config.measure, space.shape.max_position_embeddings
    batches = batches_of(space, device, workload)
    grid = grid_for(options, workload, batches, limit)
    shapes = check_shapes(options, grid, workload, batches)
    if max(*grid.contexts, *grid.prompts, *(length for _, _, length in shapes)) > limit:
        fix = "lower measure.contexts, .prompts or .check_at"
        raise UserError(f"the grid reaches beyond the space's context of {limit}; {fix}")
    if (most := max(options.energy_batches or [0])) > grid.batches[-1]:
        raise UserError(f"measure.energy_batches has {most} but the grid's largest batch is {grid.batches[-1]}")
    if outside := [at for at in options.check_at or () if not grid.surrounds(*at)]:
        raise UserError(
            f"measure.check_at has {outside[0]}, which the grid of batches {list(grid.batches)} and contexts "
            f"{list(grid.contexts)} does not surround; widen measure.batches or .contexts"
        )
    revision = STEP_REVISION[workload.runtime]
    shared = {"workload": workload.to_dict(), "measure": dataclasses.asdict(options), "step_revision": revision}
    resolved = {"space": {"name": space.name, **space.to_dict()}, "device": device.slug, "check": config.check} | shared
    with start_run(path, "measure", resolved, {"measure": options.seed}) as run:
        console.print(f"Timing the layers of {space.name} on {device.name} ({workload}) in {path}")
        found = measure(space, grid, shapes, workload, options, config.check, device, path / SAMPLES)
        meta: dict[str, Any] = {"date": now(), "device": dataclasses.asdict(device), "shape": layer_shape(space.shape)}
        meta |= {"dtype": workload.dtype, "runtime": workload.runtime, "torch": torch.__version__, "git": git_state()}
        check = _write(path, found, meta | {"check": [], **shared, **found.metadata}, space)
        _print_findings(found, check)
        run.finish()


def _write(path: Path, found: Measured, meta: dict[str, Any], space: SearchSpace) -> list[dict[str, float | str]]:
    """Writes all files and returns how far the predictor is off, which it says only once its table is there."""
    write_csv(path / TABLE, found.table)
    write_json(path / META, meta)
    predictor = TableLatency(path)
    check = predict_end_to_end(found.end_to_end_ms, predictor)
    write_csv(path / CHECK, check)
    meta["check"] = summary = summarise_check(check)
    if found.energy is not None:
        write_csv(path / ENERGY, found.energy)
        meta["lasting_load"] = lasting_load(found.energy, found.table, predictor, space.shape.num_hidden_layers)
    write_json(path / META, meta)
    if not check.empty:
        title = f"{space.name} on {meta['device']['name']}, {meta['dtype']}, {meta['runtime']}, {meta['date'][:10]}"
        with figure(path / _FIGURE, "Predicted and measured models", title) as drawing:
            draw_check(drawing, check)
    return summary


def _print_findings(found: Measured, check: list[dict[str, float | str]]) -> None:
    if (drift := found.metadata.get("drift")) and drift["segments_beyond"]:
        console.print(
            f"  the machine drifted by {drift['worst']:.1%} (more than {drift['tolerance']:.0%} in "
            f"{drift['segments_beyond']} of {drift['segments']} segments); {drift['points_affected']} points were "
            f"timed again, of which {drift['points_left_unsteady']} never met it steady"
        )
    if lost := int((found.table["n"] == 0).sum()):
        console.print(f"  {lost} of {len(found.table)} points did not fit into memory and are marked so")
    for error in check:
        tau = f", Kendall τ {error['kendall_tau']:.3f}" if "kendall_tau" in error else ""
        console.print(
            f"  predicted against {error['n']} end-to-end models, {error['phase']} at batch {error['batch']} and "
            f"{error['length']} tokens: mean error {error['mape']:.2%}, worst {error['worst']:.2%}{tau}"
        )


def find_latency(
    config: Search, begun: Mapping[str, Any], space: SearchSpace, device: Device, workload: Workload
) -> Predictor:
    """The latency predictor of a search: the named table; else that of an interrupted attempt; else one that fits; else
    one measured now, where the device is at hand; else an estimate.

    A table whose machine drifted is only taken where the device is not at hand: elsewhere it is measured again.
    ``begun`` is the config that the search was begun with, empty if this is its first attempt.
    """

    batches, wanted = batches_of(space, device, workload), workload.to_dict()

    def covers(table: TableLatency) -> bool:
        return table.fits(device.slug, space, workload, batches)

    if config.latency:
        if covers(named := table_of(FinishedRun(Path(config.latency), "measure"))):
            return named
        fix = "measure that"
        raise UserError(f"latency {config.latency} does not cover {space.name} on {device.slug} at {workload}; {fix}")
    known = list(_tables(Path(config.runs_dir), device.slug))
    covering = list(filter(covers, known))
    if digest := begun.get("latency_table"):
        if same := [table for table in covering if table.digest == digest]:
            return same[0]
        raise UserError("the latency table that this search was begun with is gone; restore it, or give another name=")
    tables = [] if begun else list(filter(_ranks, covering))
    if config.device == "this" and not begun and not any(table.is_steady for table in tables):
        drifting = sorted(table.digest for table in covering if not table.is_steady)
        if covers(measured := _measured_now(config, space, device, workload, drifting)):
            return measured
        if not tables:
            what = f"{measured.folder} was measured, but memory ended before it covered {space.name} at {workload}"
            raise UserError(f"{what}; lower workload.{'memory_gib' if workload.batch == MAX else 'batch or .context'}")
    if tables:  # of those of the present decode step, first one that need not interpolate
        return min(tables, key=lambda t: (not t.is_steady, not t.is_current, t.meta.get("workload") != wanted))
    if not covering and any(table.is_of(device.slug, space, workload) for table in known):
        console.warn(
            f"No table of {device.name} covers batches {batches[0]} to {batches[-1]} at {workload}: estimating"
        )
    return RooflineLatency(device, space.shape, workload.dtype, workload.engine)


def _ranks(table: TableLatency) -> bool:
    try:
        table.check_ranking()
    except UserError as error:
        console.warn(f"Passing over a latency table: {error}")
        return False
    return True


def _measured_now(
    config: Search, space: SearchSpace, device: Device, workload: Workload, drifting: list[str]
) -> TableLatency:
    """The table for a search on this machine, of which there are none but those ``drifting``, by their digests."""
    decisive: list[Any] = [space.to_dict(), device.slug, workload.to_dict(), dataclasses.asdict(config.measure)]
    # Every attempt has its own path; but whoever joins a shared study, however late, must find the table of that.
    own = [config.name] if config.storage else drifting
    decisive += [config.check, STEP_REVISION[workload.runtime], *own]
    path = Path(config.runs_dir) / "measure" / f"{space.name}-{device.slug}-{value_hash(decisive)}"

    def make() -> None:
        kind, when = "measured table", "first"
        if drifting:
            kind, when = "table of a steady machine", "again; latency=RUN takes one as it is"
        console.print(f"No {kind} covers this space, device and workload: measuring {when}")
        measure_space(config, space, device, workload, path)

    return table_of(find_or_make(path, "measure", make))


def _tables(runs_dir: Path, slug: str) -> Iterator[TableLatency]:
    """A device's tables: this user's, newest first, then those that ship. Unusable ones are skipped with a warning."""
    own = [run for run in find_runs(runs_dir, "measure") if run.config.get("device") == slug]
    published = [meta.parent for folder in device_folders(slug) for meta in sorted(folder.glob(f"*/{META}"))]
    for load in [*(partial(table_of, run) for run in own), *(partial(TableLatency, folder) for folder in published)]:
        try:
            table = load()
            table.check()
        except UserError as error:
            console.warn(f"Passing over a latency table: {error}")
        else:
            yield table
