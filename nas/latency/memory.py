"""What serving takes of a device's memory, and the largest batch that fits.

weights      every parameter, and the rotary table
KV cache     every layer's own groups, times batch and length
workspace    the activations that live at once: of a prefill chunk or a decode step, whichever is more
library      what cuBLAS keeps for itself, and the blocks that PyTorch's allocator rounds up to

The first two are exact. What CUDA itself takes outside of PyTorch is in `Device.usable_bytes` instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nas import console
from nas.errors import UserError
from nas.latency.device import Device
from nas.latency.predictor import DTYPE_BYTES, MAX, Workload
from nas.serving.batching import padded_batches, prefill_chunks
from nas.shape import ModelShape
from nas.space import SearchSpace, format_vector

_FP32 = 4
_BLOCK = 2**21  # bytes that the allocator gets from CUDA at a time, for each large tensor
_LIBRARY = 2 * 2**25  # cuBLAS on Hopper: 32 MiB for each of two streams, the prompts' and the graph's
_SMALL = 2**24  # of the allocator, for small tensors
_FRAGMENTS = 2**25  # of the allocator, freed but in pieces; without them one of 36 trials on an H100 did not fit


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose."""

    weights: int
    kv_cache: int
    workspace: int
    library: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace + self.library


class MemoryModel:
    """Memory of any vector of a shape."""

    def __init__(self, shape: ModelShape, workload: Workload, on_gpu: bool) -> None:
        self._shape, self._workload, self._bytes = shape, workload, DTYPE_BYTES[workload.dtype]
        self._on_gpu = on_gpu
        self._layers = set(shape.layers([1] * shape.num_hidden_layers))  # whose groups activations do not depend on

    def at(self, vector: Sequence[int], batch: int) -> Memory:
        """What a vector takes at a batch."""
        shape, workload = self._shape, self._workload
        rope = 2 * shape.max_position_embeddings * shape.head_dim * _FP32
        weights = shape.parameters(vector) * self._bytes + rope
        kv_cache = batch * workload.context * shape.kv_bytes_per_token(vector, self._bytes)
        rows = prefill_chunks(batch, workload.prompt)[0]
        step = padded_batches(batch, workload.runtime)[-1]
        workspace = max(self._live_bytes(rows * workload.prompt, rows), self._live_bytes(step, step))
        workspace += batch * shape.vocab_size * self._bytes  # the logits that were handed out
        unused = 4 * shape.num_hidden_layers * _BLOCK // 2  # four matrices per layer, half a block each
        library = _LIBRARY + unused + _SMALL + _FRAGMENTS if self._on_gpu else 0
        return Memory(weights, kv_cache, workspace, library)

    def largest_batch(self, vector: Sequence[int], memory_bytes: float) -> int:
        """The most sequences that fit; 0 if not even one does."""
        fits, beyond = 0, 1
        while self.at(vector, beyond).total <= memory_bytes:
            fits, beyond = beyond, 2 * beyond
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            fits, beyond = (middle, beyond) if self.at(vector, middle).total <= memory_bytes else (fits, middle)
        return fits

    def _live_bytes(self, tokens: int, rows: int) -> int:
        """Activations at the widest point of `nas.serving`, the residual stream and the logits.

        It is in the MLP (gate, up, their activation and product) or in the attention (queries, rotated queries, and
        three fp32 copies). The norm's two fp32 copies are freed before the MLP, but larger tensors cannot use them.
        """
        hidden, widest = self._shape.hidden_size, 0
        for linears in (layer.linears for layer in self._layers):
            mlp = self._bytes * 4 * linears["gate_proj"].outputs + 2 * _FP32 * hidden
            widest = max(widest, mlp, (self._bytes * 2 + _FP32 * 3) * linears["q_proj"].outputs)
        return tokens * (widest + self._bytes * 3 * hidden) + rows * self._shape.vocab_size * self._bytes


def batch_of(workload: Workload, memory: MemoryModel, vector: Sequence[int]) -> int:
    """The workload's batch; where that is `MAX`, the largest that fits, which must be at least one sequence."""
    if workload.batch != MAX:
        return int(workload.batch)
    assert workload.memory_gib is not None
    if batch := memory.largest_batch(vector, workload.memory_gib * 2**30):
        return batch
    needed = memory.at(vector, 1).total / 2**30
    raise UserError(
        f"not one sequence of {format_vector(vector)} at context {workload.context} fits into workload.memory_gib="
        f"{workload.memory_gib:g}; it takes {needed:.3g} GiB, so raise it or lower workload.context"
    )


def batches_of(space: SearchSpace, device: Device, workload: Workload) -> list[int]:
    """The smallest and the largest batch that any vector of a space has."""
    memory = MemoryModel(space.shape, workload, device.is_gpu)
    return sorted({batch_of(workload, memory, vector) for vector in (space.largest, space.smallest)})


def check_memory(space: SearchSpace, device: Device, workload: Workload) -> None:
    """Warns where the largest vector does not fit into the device's memory at the workload's batch.

    Where not even the smallest one does, that is an error.
    """
    if workload.batch == MAX:
        return
    memory = MemoryModel(space.shape, workload, device.is_gpu)
    usable_gib = (device.usable_bytes if device.is_gpu else device.memory_bytes) / 2**30
    for vector in (space.smallest, space.largest):
        needed_gib = memory.at(vector, int(workload.batch)).total / 2**30
        if needed_gib <= usable_gib:
            continue
        words = f"{format_vector(vector)} of {space.name} takes {needed_gib:.1f} GiB ({workload}) but {device.name} "
        words += f"leaves {usable_gib:.1f}"
        if vector == space.smallest:
            raise UserError(f"{words}; lower workload.batch or .context, or take a smaller space")
        limit = math.floor(10 * usable_gib) / 10
        console.warn(f"{words}; in a search constraints.max_memory_gib={limit} rules that out")
