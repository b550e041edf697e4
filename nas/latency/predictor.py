"""What a latency is the latency of, and the interface of whatever predicts one: a measured table, or an estimate."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd

from nas.config import WorkloadConfig
from nas.errors import UserError
from nas.latency.device import Device
from nas.latency.energy import EnergyTable
from nas.serving.batching import prefill_chunks
from nas.shape import ModelShape
from nas.space import Vector, format_vector, parse_vector

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
EMBEDDING_AND_HEAD = ("embedding", "head")  # the look-up of the tokens; final norm and output head at the last position
PARTS = (*EMBEDDING_AND_HEAD, "layer", "whole")  # one layer, and an end-to-end model
POINT_COLUMNS = ["phase", "part", "groups", "batch", "length"]
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
# Of each runtime's decode step: raised when its kernels change so much that older tables are off.
STEP_REVISION = {"eager": 1, "graph": 2, "compiled": 2}
NO_ENGINE = "none"  # the GPU's time alone
MAX = "max"  # the batch: as large as fits into memory


@dataclass(frozen=True, order=True)
class Point:
    """What is timed at once."""

    phase: Phase
    part: str  # one of `PARTS`
    groups: Vector  # a layer's KV groups alone, an end-to-end model's vector, nothing for embedding and head
    batch: int  # rows
    length: int  # tokens of each row in the cache at a decode step, or of its prompt

    def row(self) -> list[Any]:
        """Plain values for a CSV: `POINT_COLUMNS`."""
        return [self.phase, self.part, format_vector(self.groups) or "0", self.batch, self.length]

    @classmethod
    def of_row(cls, phase: Any, part: Any, groups: Any, batch: Any, length: Any) -> Self:
        """Reads back what `row` wrote."""
        vector = () if part in EMBEDDING_AND_HEAD else parse_vector(str(groups))
        return cls(phase, part, vector, int(batch), int(length))


@dataclass(frozen=True)
class Workload:
    """What a model is served for; a latency without it means nothing."""

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
    context = config.context or shape.max_position_embeddings
    prompt = config.prompt or max(1, context // 2)
    if context > (most := shape.max_position_embeddings):
        raise UserError(f"workload.context is {context} but the space's context is {most}; lower it")
    if prompt > context:
        raise UserError(f"workload.prompt is {prompt} but the cache's context is {context}; lower it")
    dtype, runtime = resolve_runtime(config.dtype, config.runtime, device, "workload.")
    calibration = device.calibrated(dtype)
    engines = calibration["engines"] if calibration else [NO_ENGINE]
    if config.engine not in engines:
        what = f"what that adds to a step of {device.name} in {dtype} is not known"
        raise UserError(f"workload.engine is '{config.engine}', but {what}; use {', '.join(engines)}")
    memory_gib, most_gib = config.memory_gib, device.memory_bytes / 2**30
    if config.batch != MAX and memory_gib is not None:
        raise UserError(f"workload.memory_gib is for workload.batch=max, but the batch is {config.batch}; drop one")
    if config.batch == MAX and memory_gib is None:
        memory_gib = math.floor(100 * device.usable_bytes / 2**30) / 100
    if memory_gib is not None and memory_gib > most_gib:
        raise UserError(f"workload.memory_gib is {memory_gib:g} but {device.name} has {most_gib:.2f} GiB; lower it")
    return Workload(config.batch, context, prompt, dtype, runtime, memory_gib, config.engine)


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
    description: str  # where the numbers come from, for figures and model cards
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

    def check(self) -> pd.DataFrame | None:
        """Measured end-to-end models beside their predictions, if there are any."""
        return None

    def interval(self, ms: float) -> tuple[float, float] | None:  # noqa: ARG002
        """Between which milliseconds the time is to be expected, given an estimate ``ms``; None if measured."""
        return None

    def slowdown(self, groups: int, batch: int) -> float:  # noqa: ARG002
        """How many times as long a decode step of a uniform vector takes when steps follow one another for seconds."""
        return 1.0

    def layer_share_ms(self, groups: int, batch: int, context: int, layers: int) -> float:
        """What a layer and its share of embedding and head take of a decode step of a model of ``layers``."""
        rest_ms = self.embedding_and_head_ms("decode", batch, context) / layers
        return self.slowdown(groups, batch) * (self.layer_ms("decode", groups, batch, context) + rest_ms)

    def decode_ms(self, vector: Sequence[int], batch: int, context: int) -> float:
        """Milliseconds of one decode step of an end-to-end model, when steps follow one another."""
        counts, layers = Counter(vector).items(), len(vector)  # in any order: fsum gives the same to the last bit
        return math.fsum(n * self.layer_share_ms(groups, batch, context, layers) for groups, n in counts)

    def prefill_ms(self, vector: Sequence[int], batch: int, prompt: int) -> float:
        """Milliseconds in which the prompts of a batch go through an end-to-end model, chunk by chunk."""
        chunks = Counter(prefill_chunks(batch, prompt)).items()
        return math.fsum(times * self.forward_ms("prefill", vector, rows, prompt) for rows, times in chunks)

    def forward_ms(self, phase: Phase, vector: Sequence[int], batch: int, length: int) -> float:
        """The same of one prefill chunk, or of a decode step in a short run."""
        counts = Counter(vector).items()
        layers = math.fsum(count * self.layer_ms(phase, groups, batch, length) for groups, count in counts)
        return layers + self.embedding_and_head_ms(phase, batch, length)
