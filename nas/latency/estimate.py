"""Analytic latency, for a device that nobody has measured: bytes and operations over the rates that a device reaches.

A kernel takes at least max(bytes / bandwidth, operations / rate): the roofline of Williams, Waterman and Patterson
(2009). With data-sheet rates that is a lower bound, good for ranking vectors; a calibration in device.json has rates
that were reached in published measurements, and what serving engines add between the kernels (docs/a10g.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.errors import UserError
from nas.latency.device import Device
from nas.latency.predictor import DTYPE_BYTES, NO_ENGINE, Phase, Predictor
from nas.shape import LayerSpec, ModelShape


@dataclass(frozen=True)
class Constants:
    """What kernels reach of a device's data sheet; the defaults are the data sheet itself."""

    weight_bandwidth: float = 1.0  # share of the bandwidth at which the GEMMs read their weights
    cache_bandwidth: float = 1.0  # share of it at which decode attention reads the KV cache
    elementwise_bandwidth: float = math.inf  # share of it that norms, rotary embeddings, activations, residuals reach
    compute: float = 1.0  # share of the matrix rate
    overlap: float = math.inf  # p: a kernel's times t and u take (t^p + u^p)^(1/p), from their sum to the longer one
    cache_ramp_tokens: float = 0.0  # each sequence's cache costs as if it were this many tokens longer
    attention_ms: float = 0.0  # what attention takes at least, per layer
    elementwise_ms: float = 0.0  # what the elementwise kernels take at least, per layer


class RooflineLatency(Predictor):
    """Latency model from a device's data sheet and, where its device.json has one for ``dtype``, a calibration.

    A decode step takes the GPU's time, and what a serving ``engine`` adds to it: `resolve_workload` knows which can.
    """

    source = "estimated"

    def __init__(self, device: Device, shape: ModelShape, dtype: str, engine: str = NO_ENGINE) -> None:
        if device.bandwidth_bytes_per_s is None or dtype not in device.flops:
            raise UserError(f"{device.name} has neither a measured table nor data-sheet rates for {dtype}; measure it")
        self._shape, self._bytes, self._engine = shape, DTYPE_BYTES[dtype], engine
        calibration = device.calibrated(dtype)
        self._constants = Constants(**calibration["constants"]) if calibration else Constants()
        self._share: dict[str, Any] = calibration["engines"][engine] if calibration else {}
        self._bandwidth = device.bandwidth_bytes_per_s
        self._rate = device.flops[dtype] * self._constants.compute
        self.description = f"estimated from the data sheet of {device.name}"
        if calibration and (check := self._share.get("check")):  # there is none while it is being fitted
            added = "" if engine == NO_ENGINE else f" and what {engine} adds"
            self.description = (
                f"estimated: the GPU's time{added}, calibrated from {calibration['measurements']} published "
                f"measurements; {check['points']} decode steps of serving engines, each predicted without its source, "
                f"were off by {check['median_error']:.1%} in the median, {check['worst_error']:.1%} at worst"
            )

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        constants, layer = self._constants, self._shape.layer(groups)
        new_tokens = batch * (length if phase == "prefill" else 1)
        # Prefill is causal: a query sees half of the prompt on average.
        seen = batch * (length if phase == "decode" else length * (length + 1) / 2)
        operations = 4 * seen * layer.linears["q_proj"].outputs
        cached = batch * (length + constants.cache_ramp_tokens) * layer.kv_values_per_token
        # Kernels run one after the other, so their times add up; only within one do bytes and operations overlap.
        attention_ms = constants.attention_ms + self._kernel_ms(cached, operations, constants.cache_bandwidth)
        elementwise_ms = max(constants.elementwise_ms, self._moved_ms(new_tokens * elementwise_values(layer)))
        return self._gemms_ms(layer.parameters, new_tokens) + attention_ms + elementwise_ms

    def embedding_and_head_ms(self, phase: Phase, batch: int, length: int) -> float:
        new_tokens = batch * (length if phase == "prefill" else 1)
        embedding_ms = self._moved_ms(2 * new_tokens * self._shape.hidden_size)  # a row is read, and written
        # The head sees one position of each sequence.
        return embedding_ms + self._gemms_ms(self._shape.vocab_size * self._shape.hidden_size, batch)

    def decode_ms(self, vector: Sequence[int], batch: int, context: int) -> float:
        gpu_ms, share = super().decode_ms(vector, batch, context), self._share
        if self._engine == NO_ENGINE:
            return gpu_ms
        if batch > share["most_sequences"]:
            raise UserError(
                f"workload.engine={self._engine}: what that adds to a step is known for up to "
                f"{share['most_sequences']} sequences, not for {batch}; lower workload.batch, or use engine=none"
            )
        return gpu_ms + float(share["step_ms"] + share["sequence_ms"] * batch)

    def interval(self, ms: float) -> tuple[float, float]:
        """Where most steps of a serving engine lie that a further source publishes; an uncalibrated one has no end."""
        if not self._share:
            return ms, math.inf
        return ms * self._share["check"]["low"], ms * self._share["check"]["high"]

    def _gemms_ms(self, weights: int, tokens: int) -> float:
        return self._kernel_ms(weights, 2 * tokens * weights, self._constants.weight_bandwidth)

    def _moved_ms(self, values: int) -> float:
        return 1e3 * values * self._bytes / (self._bandwidth * self._constants.elementwise_bandwidth)

    def _kernel_ms(self, values: float, operations: float, share: float) -> float:
        times_ms = 1e3 * (values * self._bytes) / (self._bandwidth * share), 1e3 * operations / self._rate
        return float(np.linalg.norm(times_ms, ord=self._constants.overlap))


def elementwise_values(layer: LayerSpec) -> int:
    """Values that a layer's elementwise kernels read and write for each new token.

    Two norms (read, write) and two residual additions (read two, write one) of the hidden size; queries and keys
    rotated (read, write); gate and up read, their product written.
    """
    linears = layer.linears
    rotated = linears["q_proj"].outputs + linears["k_proj"].outputs
    return (2 * 2 + 2 * 3) * layer.shape.hidden_size + 2 * rotated + 3 * linears["gate_proj"].outputs
