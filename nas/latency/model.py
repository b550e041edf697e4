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
from nas.space import ModelShape

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Workload:
    """What a latency is the latency of.

    Attributes:
        batch: Sequences decoded together.
        context: Tokens that each sequence has in the cache, the new one included, at the timed decode step.
        prompt: Tokens of each sequence in the timed prefill.
        dtype: ``fp32`` or ``bf16``, of weights, activations and cache.
        runtime: ``eager`` or ``graph``.
    """

    batch: int
    context: int
    prompt: int
    dtype: str
    runtime: str

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}, prompt {self.prompt}, {self.dtype}, {self.runtime}"


def resolve_workload(config: WorkloadConfig, shape: ModelShape, device: Device) -> Workload:
    """Fills in what the config leaves to the space and the device.

    Raises:
        UserError: A length is beyond the space's context, or the runtime needs a GPU.
    """
    limit = shape.max_position_embeddings
    context = config.context or limit
    prompt = config.prompt or max(1, context // 2)
    for key, value in (("context", context), ("prompt", prompt)):
        if value > limit:
            raise UserError(f"workload.{key} is {value} but the space's context is {limit}; lower it")
    runtime = config.runtime if config.runtime != "auto" else "graph" if device.is_gpu else "eager"
    if runtime == "graph" and not device.is_gpu:
        raise UserError(f"workload.runtime=graph needs a GPU but the device is {device.name}; use eager")
    dtype = config.dtype if config.dtype != "auto" else "bf16" if device.is_gpu else "fp32"
    return Workload(config.batch, context, prompt, dtype, runtime)


class LatencyModel(Protocol):
    """Milliseconds of the parts of a model, for one device, shape, dtype and runtime."""

    source: str  # measured | published | estimated

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        """One layer with ``groups`` KV groups: a decode step at context ``length``, or a prefill of that many tokens.

        Raises:
            UserError: The model does not cover these.
        """

    def ends_ms(self, phase: Phase, batch: int, length: int) -> float:
        """Embedding, final norm and output head (last position only)."""

    def describe(self) -> str:
        """Where its numbers come from, for figures and model cards."""


def decode_ms(model: LatencyModel, vector: Sequence[int], workload: Workload) -> float:
    """Milliseconds of one decode step of a whole model: one new token for every sequence of the batch."""
    return _sum(model, "decode", vector, workload.batch, workload.context)


def prefill_ms(model: LatencyModel, vector: Sequence[int], workload: Workload) -> float:
    """Milliseconds of the prompt pass of a whole model."""
    return _sum(model, "prefill", vector, workload.batch, workload.prompt)


def _sum(model: LatencyModel, phase: Phase, vector: Sequence[int], batch: int, length: int) -> float:
    counts = sorted(Counter(vector).items())  # in one order: vectors with equal counts cost the same to the last bit
    layers = math.fsum(count * model.layer_ms(phase, groups, batch, length) for groups, count in counts)
    return layers + model.ends_ms(phase, batch, length)
