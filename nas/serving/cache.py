"""The static KV cache: allocated once, written in place, each layer with the bytes that its own groups need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.shape import ModelShape


@dataclass
class LayerCache:
    """Keys and values of one layer."""

    keys: Tensor  # BGCd
    values: Tensor  # BGCd
    semaphores: Tensor  # of `decode_attention`; layers and rows share them, so decode one after the other


def layer_caches(
    keys: Tensor, values: Tensor, shape: ModelShape, vector: Sequence[int], batch: int, length: int
) -> list[LayerCache]:
    """Shares flat keys and values out to the layers of a vector; what is left of them stays unused."""
    sizes = [(batch, spec.kv_groups, length, shape.head_dim) for spec in shape.layers(vector)]
    counts = [math.prod(size) for size in sizes]
    slices = (storage[: sum(counts)].split(counts) for storage in (keys, values))
    semaphores = torch.zeros(batch * max(vector), device=keys.device, dtype=torch.int32)
    return [LayerCache(k.view(size), v.view(size), semaphores) for k, v, size in zip(*slices, sizes, strict=True)]


class KVCache:
    """The caches of all layers, for ``batch`` sequences of ``length`` tokens."""

    def __init__(
        self,
        shape: ModelShape,
        vector: Sequence[int],
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch, self.length = batch, length
        count = batch * length * sum(spec.kv_values_per_token for spec in shape.layers(vector)) // 2
        # Two allocations, as many would waste memory. Not one: the compiler must see that keys never are values.
        keys, values = (torch.zeros(count, device=device, dtype=dtype) for _ in range(2))
        self.layers = layer_caches(keys, values, shape, vector, batch, length)

    def rows(self, begin: int, end: int) -> list[LayerCache]:
        """Those of some rows of the batch."""
        return [LayerCache(c.keys[begin:end], c.values[begin:end], c.semaphores) for c in self.layers]
