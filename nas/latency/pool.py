"""A pool of real layers, from which every point of a table, and every end-to-end model, is put together.

A layer timed alone would find its weights and KV cache in the processor's cache, where an end-to-end model never finds
them. So the pool has as many layers as the model, each with weights and a KV cache of its own; a point runs them one
after the other and divides. Layers of one position share what does not depend on their groups. All points share the
memory of the KV caches; where it is too small for all layers (many groups at a batch of ``batch=max``), fewer are run,
but never so few that a processor's cache could hold them.
"""

import gc
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nas.latency.points import Point
from nas.model.decoder import RMSNorm, rope_table
from nas.serving.batching import padded_batches
from nas.serving.cache import LayerCache, layer_caches
from nas.serving.layers import InputMajorLinear, Position, ServingLayer, last_logits, no_partials, randomise, run_layers
from nas.serving.runtime import DTYPES, captured, compile_layers, fastest_rows
from nas.space import SearchSpace, Vector

_M = TypeVar("_M", bound=nn.Module)
_BEYOND_CACHES = 2**28  # bytes: more than any processor's own cache holds
_FEWEST_LAYERS = 4  # that are run for the time of one, unless the model has fewer
_MOST_COPIES = 16  # of embedding and head, in one timing


class LayerPool:
    """Layers of every number of groups in a space, and what runs them at a point."""

    def __init__(
        self,
        space: SearchSpace,
        dtype: str,
        runtime: str,
        device: torch.device,
        points: Iterable[Point],
        memory_bytes: int,
    ) -> None:
        shape, points = space.shape, list(points)
        self._shape, self._runtime, self._dtype, self.device = shape, runtime, DTYPES[dtype], device
        self._generator = torch.Generator(device).manual_seed(0)
        self._depth = shape.num_hidden_layers
        self._layers: list[dict[int, ServingLayer]] = []  # by position, then by groups
        for _ in range(self._depth):
            position: dict[int, ServingLayer] = {}
            for groups in sorted(set().union(*space.choices)):
                position[groups] = self._make_layer(groups, next(iter(position.values()), None))
            self._layers.append(position)
        # So many that no copy is still in the processor's cache when its turn comes again.
        head_bytes = shape.vocab_size * shape.hidden_size * self._dtype.itemsize
        copies = max(2, min(_MOST_COPIES, -(-_BEYOND_CACHES // head_bytes)))
        self._embeddings_and_heads = [self._make_embedding_and_head() for _ in range(copies)]
        self._rope = tuple(table.to(device) for table in rope_table(shape))
        if runtime == "compiled":
            compile_layers(layer for position in self._layers for layer in position.values())
        tokens = max(
            p.batch * p.length if p.phase == "prefill" else padded_batches(p.batch, runtime)[-1] for p in points
        )
        self._tokens = torch.randint(shape.vocab_size, (tokens,), device=device, generator=self._generator)
        self._x = torch.empty(tokens * shape.hidden_size, device=device, dtype=self._dtype)
        self._x.normal_(generator=self._generator)
        self.step_rows: dict[int, int] = {}  # by batch, as far as was asked for
        self._arena = self._make_arena(points, memory_bytes)
        self._graphs = torch.cuda.graph_pool_handle() if runtime != "eager" else None
        self._prepared: dict[Point, tuple[Callable[[], Any], int]] = {}  # keeps that pool alive, too

    def prepare(self, point: Point) -> tuple[Callable[[], Any], int]:
        """What runs a point, and by how much its time is to be divided; `torch.OutOfMemoryError` if it does not fit."""
        if point in self._prepared:
            return self._prepared[point]
        try:
            call, divisor = self._call(point)
            call()  # compiles, where that is asked for
            captures = self._runtime != "eager" and point.phase == "decode"
            self._prepared[point] = (captured(call, self._graphs) if captures else call), divisor
        except torch.OutOfMemoryError:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise
        return self._prepared[point]

    def _call(self, point: Point) -> tuple[Callable[[], Any], int]:
        tokens_BT = self._tokens[: self._token_count(point)].view(self._rows(point), -1)
        copies = self._embeddings_and_heads
        if point.part == "embedding":
            return lambda: [embedding(tokens_BT) for embedding, _, _ in copies], len(copies)
        if point.part == "head":
            x_BTD, last = self._x_at(point), self._position(point)
            none = no_partials(x_BTD)
            return lambda: [last_logits(x_BTD, none, norm, head, last) for _, norm, head in copies], len(copies)
        if point.part == "layer":
            if not (depth := self.depth_of(point)):
                raise _no_room(point)
            x_BTD = self._x_at(point)
            layer_body = self._body(point, point.groups * depth)
            return lambda: layer_body(x_BTD), depth
        body, last = self._body(point, point.groups), self._position(point)
        embedding, norm, head = copies[0]
        return lambda: last_logits(*body(embedding(tokens_BT)), norm, head, last), 1

    def _body(self, point: Point, vector: Vector) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        layers = [position[groups] for position, groups in zip(self._layers, vector, strict=False)]
        caches, last = self._caches(point, vector), self._position(point)
        return lambda x_BTD: run_layers(layers, x_BTD, self._rope, caches, last)  # type: ignore[arg-type]

    def _position(self, point: Point) -> Position:
        if point.phase == "prefill":
            return None
        return point.length - 1 if self._runtime == "eager" else torch.tensor(point.length - 1, device=self.device)

    def depth_of(self, point: Point) -> int:
        """How many layers are run for the time of one: all, or as many as there is room for; 0 if those are too few."""
        size = self._cache_size(point, point.groups[0])
        fits = min(self._depth, self._arena[0].numel() // size)
        read_bytes = fits * 2 * size * self._dtype.itemsize
        return fits if fits == self._depth or (fits >= _FEWEST_LAYERS and read_bytes >= _BEYOND_CACHES) else 0

    def fitting_batch(self, vector: Vector, batch: int, length: int) -> int:
        """The batch, or the largest whose caches there is room for."""
        return min(batch, self._arena[0].numel() // (sum(map(self._keys_per_token, vector)) * length))

    def _caches(self, point: Point, vector: Vector) -> list[LayerCache]:
        if sum(self._cache_size(point, groups) for groups in vector) > self._arena[0].numel():
            raise _no_room(point)
        return layer_caches(*self._arena, self._shape, vector, point.batch, point.length)

    def _cache_size(self, point: Point, groups: int) -> int:
        return point.batch * point.length * self._keys_per_token(groups)

    def _keys_per_token(self, groups: int) -> int:
        return self._shape.layer(groups).kv_values_per_token // 2

    def _x_at(self, point: Point) -> Tensor:
        tokens, width = self._token_count(point), self._shape.hidden_size
        return self._x[: tokens * width].view(self._rows(point), -1, width)

    def _rows(self, point: Point) -> int:
        """Of the tensors that go through the layers."""
        if point.phase == "prefill":
            return point.batch
        if point.batch not in self.step_rows:
            self.step_rows[point.batch] = fastest_rows(self._layers[0].values(), point.batch, self._runtime)
        return self.step_rows[point.batch]

    def _token_count(self, point: Point) -> int:
        return self._rows(point) * (point.length if point.phase == "prefill" else 1)

    def _make_layer(self, groups: int, twin: ServingLayer | None) -> ServingLayer:
        """A layer with random weights, but for those that it shares with its twin."""
        with torch.device("meta"):
            layer = ServingLayer(self._shape.layer(groups))
        if twin:
            layer.share(twin)
        own = [layer.qkv_proj, *([layer.q_norm, layer.k_norm] if layer.qk_norm else [])] if twin else [layer]
        for module in own:
            self._fill(module)
        return layer.eval()

    def _make(self, kind: type[_M], *arguments: Any, **more: Any) -> _M:
        with torch.device("meta"):
            module = kind(*arguments, **more)
        return self._fill(module)

    def _fill(self, module: _M) -> _M:
        module.to(self._dtype).to_empty(device=self.device).requires_grad_(False)
        randomise(module, self._generator)
        return module

    def _make_embedding_and_head(self) -> tuple[nn.Module, RMSNorm, nn.Module]:
        """Embedding, final norm and output head, whose weight lies as that of a `ServingModel`."""
        shape = self._shape
        head = nn.Linear if shape.tie_word_embeddings else InputMajorLinear
        return (
            self._make(nn.Embedding, shape.vocab_size, shape.hidden_size),
            self._make(RMSNorm, shape.hidden_size, shape.rms_norm_eps),
            self._make(head, shape.hidden_size, shape.vocab_size, bias=False),
        )

    def _make_arena(self, points: Iterable[Point], memory_bytes: int) -> tuple[Tensor, Tensor]:
        """Memory for the keys and values of any point: what the largest takes, or as much as there is."""
        held = sum(parameter.nbytes for position in self._layers for parameter in _distinct(position.values()))
        held += sum(parameter.nbytes for modules in self._embeddings_and_heads for parameter in _distinct(modules))
        fits = max(0, memory_bytes - held) // (2 * self._dtype.itemsize)
        vectors = {p: p.groups * self._depth if p.part == "layer" else p.groups for p in points if p.groups}
        most = max((sum(self._cache_size(p, g) for g in vector) for p, vector in vectors.items()), default=0)
        keys, values = (torch.empty(min(fits, most), device=self.device, dtype=self._dtype) for _ in range(2))
        for cache in (keys, values):  # never time zeros
            cache.normal_(generator=self._generator)
        return keys, values


def _no_room(point: Point) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"no room for the caches of {point.batch} x {point.length} tokens")


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return list({id(p): p for module in modules for p in module.parameters()}.values())
