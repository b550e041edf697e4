"""Measures a space: every part of its models over a grid, whole models to check the predictor by, and their power."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from nas.config import MeasureConfig
from nas.hardware import nvml_state
from nas.latency.check import random_vectors
from nas.latency.device import Device
from nas.latency.energy import ENERGY_COLUMNS, idle_watts, measure_energy
from nas.latency.model import Phase, Workload
from nas.latency.points import Grid, Point
from nas.latency.pool import LayerPool
from nas.latency.table import COLUMNS, summarise
from nas.latency.timing import Samples, drift_report, time_points, usable
from nas.space import SearchSpace

_MOST_MEMORY = 0.85  # of what is free: the rest is for activations, graphs and libraries


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Attributes:
        table: `nas.latency.table.COLUMNS`.
        wholes_ms: Of the whole models.
        energy: `nas.latency.energy.ENERGY_COLUMNS`, or None where it was not measured.
        facts: For latency.json: drift, the GPU's state before and after, idle power.
    """

    table: pd.DataFrame
    wholes_ms: dict[Point, float]
    energy: pd.DataFrame | None
    facts: dict[str, Any]


def measure(
    space: SearchSpace,
    grid: Grid,
    shapes: list[tuple[Phase, int, int]],
    workload: Workload,
    config: MeasureConfig,
    check: int,
    device: Device,
    samples_path: Path | None = None,
) -> Measured:
    """Times the grid, and ``check`` whole models of random vectors at each of ``shapes``, all in the same rounds.

    Args:
        space: The search space.
        grid: Batches and lengths.
        shapes: Phase, batch and length of the whole models.
        workload: Its dtype and runtime count, and its context is the sentinel's.
        config: Rounds, spread, drift, energy.
        check: How many vectors.
        device: The device at hand.
        samples_path: Where samples are kept, and those of an interrupted attempt are.
    """
    torch_device = torch.device("cuda" if device.is_gpu else "cpu")
    vectors = random_vectors(space, check, config.seed)
    wholes = [Point(phase, "whole", vector, batch, length) for phase, batch, length in shapes for vector in vectors]
    points = grid.points(space) + wholes
    uuid = str(torch.cuda.get_device_properties(0).uuid) if device.is_gpu else None
    state = nvml_state(uuid) if uuid else {}
    watts = idle_watts(config.energy_s, uuid) if uuid and config.energy_s else None
    pool = LayerPool(space, workload.dtype, workload.runtime, torch_device, points, _free_bytes(device))
    samples = Samples.at(samples_path) if samples_path else Samples()
    sentinel = Point("decode", "layer", (max(space.largest),), min(grid.batches), workload.context)
    time_points(points, sentinel, pool.prepare, config, torch_device, samples)

    rows, wholes_ms = [], {}
    for point, times in usable(samples, config):
        summary = summarise(times)
        if point.part == "whole":
            if math.isfinite(summary["median_ms"]):
                wholes_ms[point] = float(summary["median_ms"])
        else:
            rows.append(dict(zip(COLUMNS, [*point.row(), *summary.values()], strict=True)))
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"groups": int}).sort_values(COLUMNS[:5], ignore_index=True)
    energy = _energy(space, grid, workload, config, pool, uuid) if uuid and config.energy_s else None
    facts: dict[str, Any] = {"drift": drift_report(samples, config)}
    if uuid:
        facts |= {"state_before": state, "state_after": nvml_state(uuid), "idle_watts": watts}
    return Measured(table, wholes_ms, energy, facts)


def _energy(
    space: SearchSpace, grid: Grid, workload: Workload, config: MeasureConfig, pool: LayerPool, uuid: str
) -> pd.DataFrame | None:
    """Power of uniform whole models at the workload's context, for the given batches; None where NVML is silent."""
    rows = []
    for batch in config.energy_batches or [max(grid.batches)]:
        for groups in sorted(set().union(*space.choices)):
            vector = (groups,) * space.shape.num_hidden_layers
            try:
                call, _ = pool.prepare(Point("decode", "whole", vector, batch, workload.context))
            except torch.OutOfMemoryError:
                return None
            with torch.inference_mode():
                found = measure_energy(call, config.energy_s, uuid, torch.cuda.synchronize)
            if found is None:
                return None
            numbers = (found.watts, found.joules_per_call, found.seconds, found.calls, found.method)
            rows.append((groups, batch, workload.context, *numbers))
    return pd.DataFrame(rows, columns=ENERGY_COLUMNS)


def _free_bytes(device: Device) -> int:
    if device.is_gpu:
        return int(_MOST_MEMORY * torch.cuda.mem_get_info()[0])
    return int(_MOST_MEMORY * psutil.virtual_memory().available)
