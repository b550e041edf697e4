"""A latency model predicts whole models as a sum: their layers, by groups, and their two ends.

Layers of one shape cost the same wherever they stand, so a vector's time is the sum of one number a layer plus the
embedding and output head. Where those numbers come from is the model's affair: a measured table, or an estimate.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nas.config import WorkloadConfig
from nas.errors import UserError
from nas.latency.device import Device
from nas.serving.batching import prefill_chunks
from nas.shape import ModelShape

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
# Of the decode step that a runtime runs: raised where its kernels change so much that tables of before are off.
STEP_REVISION = {"eager": 1, "graph": 2, "compiled": 2}
MAX = "max"  # the batch that is as large as fits into the memory


@dataclass(frozen=True)
class Workload:
    """What a latency is the latency of.

    Attributes:
        batch: Sequences decoded together, or `MAX`: of each vector as many as fit.
        context: Tokens that each sequence has in the cache, the new one included, at the timed decode step.
        prompt: Tokens of each sequence in the timed prefill.
        dtype: ``fp32`` or ``bf16``, of weights, activations and cache.
        runtime: ``eager``, ``graph`` or ``compiled``.
        memory_gib: What `MAX` may take; None for a given batch.
    """

    batch: int | str
    context: int
    prompt: int
    dtype: str
    runtime: str
    memory_gib: float | None = None

    def __str__(self) -> str:
        within = f" in {self.memory_gib:g} GiB" if self.memory_gib else ""
        return f"batch {self.batch}{within}, context {self.context}, prompt {self.prompt}, {self.dtype}, {self.runtime}"


def resolve_workload(config: WorkloadConfig, shape: ModelShape, device: Device) -> Workload:
    """Fills in what the config leaves to the space and the device.

    Raises:
        UserError: A length is beyond the space's context, the memory beyond the device's, or the runtime needs a GPU.
    """
    limit = shape.max_position_embeddings
    context = config.context or limit
    prompt = config.prompt or max(1, context // 2)
    for key, value in (("context", context), ("prompt", prompt)):
        if value > limit:
            raise UserError(f"workload.{key} is {value} but the space's context is {limit}; lower it")
    if prompt > context:
        raise UserError(f"workload.prompt is {prompt} but the cache's context is {context}; lower it")
    dtype, runtime = resolve_runtime(config.dtype, config.runtime, device, "workload.")
    if config.batch != MAX:
        if config.memory_gib is not None:
            raise UserError(f"workload.memory_gib is for workload.batch=max, but the batch is {config.batch}; drop one")
        return Workload(config.batch, context, prompt, dtype, runtime)
    most_gib = device.memory_bytes / 2**30
    if config.memory_gib is not None and config.memory_gib > most_gib:
        raise UserError(
            f"workload.memory_gib is {config.memory_gib:g} but {device.name} has {most_gib:.2f} GiB; lower it"
        )
    memory_gib = config.memory_gib or math.floor(100 * device.usable_bytes / 2**30) / 100
    return Workload(MAX, context, prompt, dtype, runtime, memory_gib)


def resolve_runtime(dtype: str, runtime: str, device: Device, prefix: str = "") -> tuple[str, str]:
    """What ``auto`` means on a device, for dtype and runtime, whose keys begin with ``prefix``.

    Raises:
        UserError: The runtime needs a GPU.
    """
    if runtime not in ("auto", "eager") and not device.is_gpu:
        raise UserError(f"{prefix}runtime={runtime} needs a GPU but the device is {device.name}; use eager")
    dtype = dtype if dtype != "auto" else "bf16" if device.is_gpu else "fp32"
    return dtype, runtime if runtime != "auto" else "compiled" if device.is_gpu else "eager"


class LatencyModel(Protocol):
    """Milliseconds of the parts of a model, for one device, shape, dtype and runtime."""

    source: str  # measured | estimated

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        """One layer with ``groups`` KV groups: a decode step at context ``length``, or a pass of prompts so long.

        Raises:
            UserError: The model does not cover these.
        """

    def embedding_and_head_ms(self, phase: Phase, batch: int, length: int) -> float:
        """Embedding, final norm and output head (last position only)."""

    def describe(self) -> str:
        """Where its numbers come from, for figures and model cards."""


def decode_ms(model: LatencyModel, vector: Sequence[int], batch: int, context: int) -> float:
    """Milliseconds of one decode step of a whole model: one new token for every sequence of the batch."""
    return pass_ms(model, "decode", vector, batch, context)


def prefill_ms(model: LatencyModel, vector: Sequence[int], batch: int, prompt: int) -> float:
    """Milliseconds in which the prompts of a batch go through a whole model, in passes."""
    parts = sorted(Counter(prefill_chunks(batch, prompt)).items())
    return math.fsum(times * pass_ms(model, "prefill", vector, rows, prompt) for rows, times in parts)


def pass_ms(model: LatencyModel, phase: Phase, vector: Sequence[int], batch: int, length: int) -> float:
    """Milliseconds of one decode step, or of one pass of prompts, of a whole model."""
    counts = sorted(Counter(vector).items())  # in one order: vectors with equal counts cost the same to the last bit
    layers = math.fsum(count * model.layer_ms(phase, groups, batch, length) for groups, count in counts)
    return layers + model.embedding_and_head_ms(phase, batch, length)
