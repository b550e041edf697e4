"""What `nas measure` times, and what comes of it: a grid of layers, embedding and head, end-to-end models, power."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from nas.config import MeasureConfig
from nas.latency.accuracy import random_vectors
from nas.latency.device import Device
from nas.latency.energy import ENERGY_COLUMNS, idle_watts, measure_energy
from nas.latency.pool import LayerPool
from nas.latency.predictor import EMBEDDING_AND_HEAD, MAX, PHASES, POINT_COLUMNS, Phase, Point, Workload
from nas.latency.table import COLUMNS, summarise
from nas.latency.timing import Samples, time_points
from nas.serving.batching import prefill_chunks
from nas.space import SearchSpace

_MOST_MEMORY = 0.85  # of what is free: the rest is for activations, graphs and libraries


@dataclass(frozen=True)
class Grid:
    """The batches, and the lengths of either phase, whose combinations are timed."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]

    def surrounds(self, batch: int, context: int) -> bool:
        """Whether a decode step lies between batches and contexts that are timed."""
        return self.batches[0] <= batch <= self.batches[-1] and self.contexts[0] <= context <= self.contexts[-1]

    def shapes(self, phase: Phase) -> Iterator[tuple[int, int]]:
        """Batch and length of every point. Of prompts that is at most one prefill chunk."""
        if phase == "decode":
            return itertools.product(self.batches, self.contexts)
        most = self.batches[-1]
        return ((rows, prompt) for prompt in self.prompts for rows in sorted({1, prefill_chunks(most, prompt)[0]}))

    def points(self, space: SearchSpace) -> list[Point]:
        """All parts at all shapes; of a decode step, embedding and head depend on the batch alone."""
        points = list[Point]()
        for phase in PHASES:
            shapes = list(self.shapes(phase))
            points += [Point(phase, "layer", (groups,), *shape) for shape in shapes for groups in space.levels]
            outside = shapes if phase == "prefill" else [(batch, 1) for batch in self.batches]
            points += [Point(phase, part, (), *shape) for shape in outside for part in EMBEDDING_AND_HEAD]
        return points


def grid_for(config: MeasureConfig, workload: Workload, batches: Sequence[int], limit: int) -> Grid:
    """The config's grid, with the workload's lengths and ``batches``; two values per axis, as interpolation needs.

    With `batch=max` these are the smallest and the largest batch. ``limit`` is the space's context.
    """

    def axis(given: Sequence[int] | None, own: Sequence[int], *shares: int) -> tuple[int, ...]:
        if given is None:
            given = [max(1, max(own) // share) for share in shares]
        values = {*own, *given}
        if len(values) == 1:
            values.add(own[0] // 2 or min(2, limit))
        return tuple(sorted(values))

    return Grid(
        axis(config.batches, batches, 2, *([] if workload.batch == MAX else [4])),
        axis(config.contexts, [workload.context], 2, 4),
        axis(config.prompts, [workload.prompt], 2),
    )


def check_shapes(
    config: MeasureConfig, grid: Grid, workload: Workload, batches: Sequence[int]
) -> list[tuple[Phase, int, int]]:
    """Where end-to-end models are timed: at the workload, and at `measure.check_at` or halfway between grid points."""

    def halfway(axis: Sequence[int]) -> int:
        return sum(axis[-2:]) // len(axis[-2:])

    batch = min(batches)  # with batch=max, only the smallest vectors have more
    steps, prompts = [(batch, workload.context)], [workload.prompt]
    if config.check_at is not None:
        steps += [(rows, context) for rows, context in config.check_at]
    else:
        context = halfway(grid.contexts)
        steps += [(halfway([rows for rows in grid.batches if rows <= batch]), context), (batch, context)]
        prompts.append(halfway(grid.prompts))
    shapes: list[tuple[Phase, int, int]] = [("decode", *step) for step in steps]
    shapes += [("prefill", prefill_chunks(batch, prompt)[0], prompt) for prompt in prompts]
    return list(dict.fromkeys(shapes))


@dataclass(frozen=True)
class Measured:
    table: pd.DataFrame  # `nas.latency.table.COLUMNS`
    end_to_end_ms: dict[Point, float]  # of the end-to-end models that fitted into memory
    energy: pd.DataFrame | None  # `nas.latency.energy.ENERGY_COLUMNS`, or None where it was not measured
    metadata: dict[str, Any]  # for latency.json: drift or clock, idle power, what was timed otherwise than asked for


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
    on_gpu, uuid, watts = device.is_gpu, None, None
    torch_device, free_bytes = torch.device("cuda" if on_gpu else "cpu"), psutil.virtual_memory().available
    if on_gpu:
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        torch.cuda.synchronize()  # opens the context, which is part of what an idle card draws
        watts = idle_watts(config.energy_s, uuid) if config.energy_s else None
        free_bytes = torch.cuda.mem_get_info()[0]
    memory_bytes = int(_MOST_MEMORY * free_bytes)
    pool = LayerPool(space, workload.dtype, workload.runtime, torch_device, points, memory_bytes)
    samples = Samples.at(samples_path)
    sentinel, heaviest = (
        Point("decode", "layer", (max(space.largest),), batch, workload.context)
        for batch in (grid.batches[0], grid.batches[-1])
    )
    if on_gpu:
        with torch.inference_mode(), suppress(torch.OutOfMemoryError):
            pool.prepare(heaviest)  # first: what the CUDA graphs of others need fits into its memory
    time_points(points, sentinel, pool.prepare, config, on_gpu, samples)

    summaries = {point: summarise(times) for point, times in samples.used(config, on_gpu).items()}
    rows = [[*point.row(), *summary.values()] for point, summary in summaries.items() if point.part != "whole"]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"groups": int}).sort_values(POINT_COLUMNS, ignore_index=True)
    end_to_end_ms = {point: float(s["median_ms"]) for point, s in summaries.items() if point.part == "whole" and s["n"]}
    energy = _energy(space, grid, workload, config, pool, uuid) if uuid and config.energy_s else None
    metadata: dict[str, Any] = {"clock": "CPU time of one thread"}
    if on_gpu:
        metadata = {"drift": samples.drift_report(config), "idle_watts": watts}
    layers = [point for point, summary in summaries.items() if point.part == "layer" and summary["n"]]
    if short := sum(pool.depth_of(point) < space.shape.num_hidden_layers for point in layers):
        metadata["points_of_fewer_layers"] = short
    if padded := {batch: rows for batch, rows in sorted(pool.step_rows.items()) if rows > batch}:
        metadata["padded_batches"] = padded
    return Measured(table, end_to_end_ms, energy, metadata)


def _energy(
    space: SearchSpace, grid: Grid, workload: Workload, config: MeasureConfig, pool: LayerPool, uuid: str
) -> pd.DataFrame | None:
    """Power of uniform models at the workload's context and the given batches or the largest that fit, if known."""
    rows = []
    given = config.energy_batches or [grid.batches[0], grid.batches[-1]]
    for groups in space.levels:
        vector = (groups,) * space.shape.num_hidden_layers
        for batch in sorted({pool.fitting_batch(vector, batch, workload.context) for batch in given} - {0}):
            with torch.inference_mode(), suppress(torch.OutOfMemoryError):
                call, _ = pool.prepare(Point("decode", "whole", vector, batch, workload.context))
                choose = partial(step_and_choice, call)
                found = measure_energy(choose, config.energy_s, uuid, torch.cuda.synchronize)
                if found is None:
                    return None
                rows.append([groups, batch, workload.context, *found, "energy counter"])
    return pd.DataFrame(rows, columns=ENERGY_COLUMNS) if rows else None


def step_and_choice(step: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A decode step and the likeliest next tokens, as serving repeats it."""
    return step().argmax(-1)
