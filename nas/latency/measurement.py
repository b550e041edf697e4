"""Measures a space: its layers, embedding and head over a grid, end-to-end models as a check, and their power."""

import time
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from nas.config import MeasureConfig
from nas.errors import UserError
from nas.hardware import nvml_state
from nas.latency.accuracy import random_vectors
from nas.latency.device import Device
from nas.latency.energy import ENERGY_COLUMNS, idle_watts, measure_energy
from nas.latency.points import Grid, Point
from nas.latency.pool import LayerPool
from nas.latency.predictor import Phase, Workload
from nas.latency.samples import Samples
from nas.latency.table import COLUMNS, summarise
from nas.latency.timing import memory_watched, time_points
from nas.space import SearchSpace

_AT_WORK_S = 1.0  # until the clocks have risen
_QUEUED_CALLS = 50
_CPU_CLOCK = "CPU time of one thread"
_MOST_MEMORY = 0.85  # of what is free: the rest is for activations, graphs and libraries


@dataclass(frozen=True)
class Measured:
    """What a measurement found."""

    table: pd.DataFrame  # `nas.latency.table.COLUMNS`
    end_to_end_ms: dict[Point, float]  # of the end-to-end models that fitted into memory
    energy: pd.DataFrame | None  # `nas.latency.energy.ENERGY_COLUMNS`, or None where it was not measured
    metadata: dict[str, Any]  # for latency.json: drift, the GPU's state before and after, idle power


def measure(
    space: SearchSpace,
    grid: Grid,
    shapes: list[tuple[Phase, int, int]],
    workload: Workload,
    config: MeasureConfig,
    check: int,
    device: Device,
    samples_path: Path,
) -> Measured:
    """Times the grid, and ``check`` end-to-end models of random vectors at each of ``shapes``, in the same rounds."""
    vectors = random_vectors(space, check, config.seed)
    points = grid.points(space) + [Point(phase, "whole", v, *at) for phase, *at in shapes for v in vectors]
    uuid = str(torch.cuda.get_device_properties(0).uuid) if device.is_gpu else None
    if uuid:
        torch.cuda.synchronize()  # opens the context, which is part of what an idle card draws
    watts = idle_watts(config.energy_s, uuid) if uuid and config.energy_s else None
    torch_device = torch.device("cuda" if uuid else "cpu")
    free_bytes = torch.cuda.mem_get_info()[0] if uuid else psutil.virtual_memory().available
    try:
        with memory_watched():
            memory_bytes = int(_MOST_MEMORY * free_bytes)
            pool = LayerPool(space, workload.dtype, workload.runtime, torch_device, points, memory_bytes)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the layers of {space.name} do not fit into the memory of {device.name} with the inputs of "
            f"{grid.batches[-1]} rows; lower measure.batches, or take a smaller space"
        ) from None
    samples = Samples.at(samples_path)
    heaviest, sentinel = (
        Point("decode", "layer", (max(space.largest),), batch, workload.context)
        for batch in (grid.batches[-1], grid.batches[0])
    )
    state = _state_at_work(pool, [heaviest, sentinel], uuid) if uuid else {}
    time_points(points, sentinel, pool.prepare, config, bool(uuid), samples)

    used = samples.used(config, bool(uuid))
    summaries = {point: summarise(times) for point, times in used.items()}
    rows = [[*point.row(), *summary.values()] for point, summary in summaries.items() if point.part != "whole"]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"groups": int}).sort_values(COLUMNS[:5], ignore_index=True)
    end_to_end_ms = {point: float(s["median_ms"]) for point, s in summaries.items() if point.part == "whole" and s["n"]}
    energy = _energy(space, grid, workload, config, pool, uuid) if uuid and config.energy_s else None
    metadata: dict[str, Any] = {"drift": samples.drift_report(config)} if uuid else {"clock": _CPU_CLOCK}
    layers = [point for point, summary in summaries.items() if point.part == "layer" and summary["n"]]
    if short := sum(pool.depth_of(point) < space.shape.num_hidden_layers for point in layers):
        metadata["points_of_fewer_layers"] = short
    if padded := {batch: rows for batch, rows in sorted(pool.step_rows.items()) if rows > batch}:
        metadata["padded_batches"] = padded
    if uuid:
        state_after = _state_at_work(pool, [heaviest, sentinel], uuid)
        metadata |= {"state_before": state, "state_after": state_after, "idle_watts": watts}
    return Measured(table, end_to_end_ms, energy, metadata)


def _state_at_work(pool: LayerPool, points: list[Point], uuid: str) -> dict[str, Any]:
    """The GPU's state while it runs the first point that fits: at rest it does not show what limits it."""
    for point in points:
        with torch.inference_mode(), suppress(torch.OutOfMemoryError):
            call, _ = pool.prepare(point)
            begun = time.perf_counter()
            while time.perf_counter() - begun < _AT_WORK_S:
                call()
                torch.cuda.synchronize()
            for _ in range(_QUEUED_CALLS):
                call()
            state = nvml_state(uuid)
            torch.cuda.synchronize()
            return state
    return nvml_state(uuid)  # `time_points` reports that nothing fits


def _energy(
    space: SearchSpace, grid: Grid, workload: Workload, config: MeasureConfig, pool: LayerPool, uuid: str
) -> pd.DataFrame | None:
    """Power of uniform models at the workload's context and the given batches or the largest that fit, if known."""
    rows = []
    given = config.energy_batches or [grid.batches[0], grid.batches[-1]]
    for groups in sorted(set().union(*space.choices)):
        vector = (groups,) * space.shape.num_hidden_layers
        for batch in sorted({pool.fitting_batch(vector, batch, workload.context) for batch in given} - {0}):
            with torch.inference_mode(), suppress(torch.OutOfMemoryError):
                call, _ = pool.prepare(Point("decode", "whole", vector, batch, workload.context))
                found = measure_energy(call, config.energy_s, uuid, torch.cuda.synchronize)
                if found is None:
                    return None
                rows.append([groups, batch, workload.context, *astuple(found), "energy counter"])
    return pd.DataFrame(rows, columns=ENERGY_COLUMNS) if rows else None
