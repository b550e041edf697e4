"""What a latency is the latency of, and the interface of whatever predicts one: a measured table, or an estimate."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from nas.config import WorkloadConfig
from nas.errors import UserError
from nas.latency.device import Device
from nas.latency.energy import EnergyTable
from nas.serving.batching import prefill_chunks
from nas.shape import ModelShape

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
# Of each runtime's decode step: raised when its kernels change so much that older tables are off.
STEP_REVISION = {"eager": 1, "graph": 2, "compiled": 2}
NO_ENGINE = "none"  # the GPU's time alone
MAX = "max"  # the batch: as large as fits into memory


@dataclass(frozen=True)
class Workload:
    """What a latency is the latency of."""

    batch: int | str  # sequences decoded together, or `MAX`: of each vector as many as fit
    context: int  # tokens that each sequence has in the cache, the new one included, at the timed decode step
    prompt: int  # tokens of each sequence in the timed prefill
    dtype: str  # ``fp32`` or ``bf16``, of weights, activations and cache
    runtime: str  # ``eager``, ``graph`` or ``compiled``
    memory_gib: float | None = None  # what `MAX` may take; None for a given batch
    engine: str = NO_ENGINE  # the serving engine whose own work a decode step holds

    def __str__(self) -> str:
        within = f" in {self.memory_gib:g} GiB" if self.memory_gib else ""
        engine = "" if self.engine == NO_ENGINE else f", engine {self.engine}"
        lengths = f"context {self.context}, prompt {self.prompt}"
        return f"batch {self.batch}{within}, {lengths}, {self.dtype}, {self.runtime}{engine}"

    def to_dict(self) -> dict[str, Any]:
        """For run.json and latency.json, as before there were engines where there is none."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("engine", NO_ENGINE)}


def resolve_workload(config: WorkloadConfig, shape: ModelShape, device: Device) -> Workload:
    """Fills in what the config leaves to the space and the device, and checks it against both."""
    limit = shape.max_position_embeddings
    context = config.context or limit
    prompt = config.prompt or max(1, context // 2)
    for key, value, whose, most in (("context", context, "space", limit), ("prompt", prompt, "cache", context)):
        if value > most:
            raise UserError(f"workload.{key} is {value} but the {whose}'s context is {most}; lower it")
    dtype, runtime = resolve_runtime(config.dtype, config.runtime, device, "workload.")
    calibration = device.calibration or {"dtypes": []}
    engines = calibration["engines"] if dtype in calibration["dtypes"] else [NO_ENGINE]
    if config.engine not in engines:
        raise UserError(
            f"workload.engine is '{config.engine}', but what that adds to a step of {device.name} in {dtype} is not "
            f"known; use {', '.join(engines)}"
        )
    if config.batch != MAX:
        if config.memory_gib is not None:
            raise UserError(f"workload.memory_gib is for workload.batch=max, but the batch is {config.batch}; drop one")
        return Workload(config.batch, context, prompt, dtype, runtime, engine=config.engine)
    most_gib = device.memory_bytes / 2**30
    if config.memory_gib is not None and config.memory_gib > most_gib:
        raise UserError(
            f"workload.memory_gib is {config.memory_gib:g} but {device.name} has {most_gib:.2f} GiB; lower it"
        )
    memory_gib = config.memory_gib or math.floor(100 * device.usable_bytes / 2**30) / 100
    return Workload(MAX, context, prompt, dtype, runtime, memory_gib, config.engine)


def resolve_runtime(dtype: str, runtime: str, device: Device, prefix: str = "") -> tuple[str, str]:
    """What ``auto`` means on a device, for dtype and runtime, whose keys begin with ``prefix``."""
    if runtime not in ("auto", "eager") and not device.is_gpu:
        raise UserError(f"{prefix}runtime={runtime} needs a GPU but the device is {device.name}; use eager")
    dtype = dtype if dtype != "auto" else "bf16" if device.is_gpu else "fp32"
    return dtype, runtime if runtime != "auto" else "compiled" if device.is_gpu else "eager"


class Predictor(ABC):
    """Predicts the times of models for one device, layer shape, dtype and runtime.

    A layer takes the same time wherever it stands, so a model takes the sum of its layers, embedding and head.
    """

    source: str  # ``measured`` or ``estimated``
    folder: Path | None = None  # where a measured table lies; None for an estimate, as are the next three
    digest: str | None = None  # the hash of its times
    idle_watts: float | None = None  # power of the idle device, if it was measured
    energy: EnergyTable | None = None  # the power of decode steps, if it was measured

    @abstractmethod
    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        """One layer: a decode step at context ``length``, or prompts of that length; `UserError` if not covered."""

    @abstractmethod
    def embedding_and_head_ms(self, phase: Phase, batch: int, length: int) -> float:
        """Embedding, final norm and output head (last position only)."""

    @abstractmethod
    def describe(self) -> str:
        """Where the numbers come from, for figures and model cards."""

    def check(self) -> pd.DataFrame | None:
        """Measured end-to-end models beside their predictions, if there are any."""
        return None

    def interval(self, ms: float) -> tuple[float, float] | None:  # noqa: ARG002
        """Between which milliseconds the time is to be expected, given an estimate ``ms``; None if measured."""
        return None

    def decode_ms(self, vector: Sequence[int], batch: int, context: int) -> float:
        """Milliseconds of one decode step of an end-to-end model."""
        return self.forward_ms("decode", vector, batch, context)

    def prefill_ms(self, vector: Sequence[int], batch: int, prompt: int) -> float:
        """Milliseconds in which the prompts of a batch go through an end-to-end model, chunk by chunk."""
        chunks = sorted(Counter(prefill_chunks(batch, prompt)).items())
        return math.fsum(times * self.forward_ms("prefill", vector, rows, prompt) for rows, times in chunks)

    def forward_ms(self, phase: Phase, vector: Sequence[int], batch: int, length: int) -> float:
        """The same of one decode step or one prefill chunk."""
        counts = sorted(Counter(vector).items())  # in one order: equal counts per choice cost the same to the last bit
        layers = math.fsum(count * self.layer_ms(phase, groups, batch, length) for groups, count in counts)
        return layers + self.embedding_and_head_ms(phase, batch, length)
