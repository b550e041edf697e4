"""Analytic latency, for a device that nobody has measured: whichever takes longer, the bytes or the operations.

A part of a model that must move so many bytes and do so many floating-point operations takes at least
max(bytes / bandwidth, operations / rate): the roofline of Williams, Waterman and Patterson (2009). With data-sheet
rates this is a lower bound, good for ranking vectors and stamped ``estimated`` wherever it is used.
"""

from nas.errors import UserError
from nas.latency.device import Device
from nas.latency.model import DTYPE_BYTES, Phase
from nas.space import ModelShape


class RooflineLatency:
    """Latency model from a device's data sheet.

    Args:
        device: Must know its bandwidth and its rate for ``dtype``.
        shape: The model shape.
        dtype: ``fp32`` or ``bf16``.

    Raises:
        UserError: The device's facts do not say how fast it is.
    """

    source = "estimated"

    def __init__(self, device: Device, shape: ModelShape, dtype: str) -> None:
        if device.bandwidth_bytes_per_s is None or dtype not in device.flops:
            raise UserError(f"{device.name} has neither a measured table nor data-sheet rates for {dtype}; measure it")
        self._device, self._shape, self._bytes = device, shape, DTYPE_BYTES[dtype]
        self._bandwidth, self._rate = device.bandwidth_bytes_per_s, device.flops[dtype]

    def layer_ms(self, phase: Phase, groups: int, batch: int, length: int) -> float:
        shape = self._shape
        weights = shape.layer_parameters(groups)
        new_tokens = batch * (length if phase == "prefill" else 1)
        # Prefill is causal: a query sees half of the prompt on average.
        seen = length if phase == "decode" else (length + 1) / 2
        cache_bytes = batch * length * shape.kv_bytes_per_token([groups], self._bytes)
        attention = 4 * new_tokens * seen * shape.num_attention_heads * shape.head_dim
        return self._ms(weights * self._bytes + cache_bytes, 2 * new_tokens * weights + attention)

    def ends_ms(self, phase: Phase, batch: int, length: int) -> float:  # noqa: ARG002  (the head sees one position a row)
        head = self._shape.vocab_size * self._shape.hidden_size
        return self._ms(head * self._bytes, 2 * batch * head)

    def describe(self) -> str:
        return f"estimated from the data sheet of {self._device.name}"

    def _ms(self, moved_bytes: float, operations: float) -> float:
        return 1e3 * max(moved_bytes / self._bandwidth, operations / self._rate)
