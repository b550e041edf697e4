"""What serving takes of the memory that a device leaves to PyTorch, and the largest batch that fits."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Memory(NamedTuple):
    """Bytes by purpose; the first two are exact."""

    weights: int  # every parameter, and the rotary table
    kv_cache: int  # every layer's own groups, times batch and length
    workspace: int  # the activations that live at once: of a prefill chunk or a decode step, whichever is more
    library: int  # what cuBLAS keeps for itself, and the blocks that PyTorch's allocator rounds up to

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class MemoryModel:
    shape: ModelShape
    workload: Workload
    on_gpu: bool

    def at(self, vector: Sequence[int], batch: int) -> Memory:
        """What a vector takes at a batch."""
        shape, workload, dtype_bytes = self.shape, self.workload, DTYPE_BYTES[self.workload.dtype]
        rope = 2 * shape.max_position_embeddings * shape.head_dim * _FP32
        rows = prefill_chunks(batch, workload.prompt)[0]
        step = padded_batches(batch, workload.runtime)[-1]
        workspace = max(self._live_bytes(rows * workload.prompt, rows), self._live_bytes(step, step))
        workspace += batch * shape.vocab_size * dtype_bytes  # the logits that were handed out
        unused = 4 * shape.num_hidden_layers * _BLOCK // 2  # four matrices per layer, half a block each
        return Memory(
            weights=shape.parameters(vector) * dtype_bytes + rope,
            kv_cache=batch * workload.context * shape.kv_bytes_per_token(vector, dtype_bytes),
            workspace=workspace,
            library=_LIBRARY + unused + _SMALL + _FRAGMENTS if self.on_gpu else 0,
        )

    def batch(self, vector: Sequence[int]) -> int:
        """The workload's batch; where that is `MAX`, the largest that fits, which must be at least one sequence."""
        workload = self.workload
        if workload.batch != MAX:
            return int(workload.batch)
        assert workload.memory_gib is not None
        if batch := self.largest_batch(vector, workload.memory_gib * 2**30):
            return batch
        raise UserError(
            f"not one sequence of {format_vector(vector)} at context {workload.context} fits into workload.memory_gib="
            f"{workload.memory_gib:g}; it takes {self.at(vector, 1).total / 2**30:.3g} GiB, so raise it or lower "
            "workload.context"
        )

    def largest_batch(self, vector: Sequence[int], memory_bytes: float) -> int:
        """The most sequences that fit; 0 if not even one does."""
        most = int(memory_bytes // self.at(vector, 1).kv_cache)
        return bisect_right(range(1, most + 1), memory_bytes, key=lambda batch: self.at(vector, batch).total)

    def _live_bytes(self, tokens: int, rows: int) -> int:
        """Activations at the widest point of `nas.serving`, the residual stream and the logits.

        It is in the MLP (gate, up, their activation and product; the norm's two fp32 copies are freed by then, but
        larger tensors cannot use them) or in the attention (queries, rotated queries, and three fp32 copies).
        """
        hidden, dtype_bytes = self.shape.hidden_size, DTYPE_BYTES[self.workload.dtype]
        mlp = dtype_bytes * 4 * self.shape.intermediate_size + 2 * _FP32 * hidden
        attention = (dtype_bytes * 2 + _FP32 * 3) * self.shape.num_attention_heads * self.shape.head_dim
        return tokens * (max(mlp, attention) + dtype_bytes * 3 * hidden) + rows * self.shape.vocab_size * dtype_bytes


def batches_of(space: SearchSpace, device: Device, workload: Workload) -> list[int]:
    """The smallest and the largest batch that any vector of a space has."""
    memory = MemoryModel(space.shape, workload, device.is_gpu)
    return sorted({memory.batch(vector) for vector in (space.largest, space.smallest)})


def check_serving_memory(space: SearchSpace, device: Device, workload: Workload) -> None:
    """Refuses a workload whose batch not even the smallest vector fits at; warns where the largest one does not."""
    if workload.batch == MAX:
        return
    usable_gib = (device.usable_bytes if device.is_gpu else device.memory_bytes) / 2**30
    memory = MemoryModel(space.shape, workload, device.is_gpu)
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
