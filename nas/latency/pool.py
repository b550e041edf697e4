"""A pool of real layers, from which every point of a table, and every end-to-end model, is put together.

A layer timed alone would find its weights and KV cache in the processor's cache, where an end-to-end model never finds
them. So the pool has as many layers as the model, each with weights and a KV cache of its own; a point runs them one
after the other and divides. All points share the memory of the KV caches; where it is too small for all layers (many
groups at a batch of ``batch=max``), fewer are run, but never so few that a processor's cache could hold them.
"""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nas.latency.predictor import Point
from nas.model.decoder import RMSNorm, rope_table
from nas.serving.batching import padded_batches
from nas.serving.cache import layer_caches
from nas.serving.layers import InputMajorLinear, Position, ServingLayer, last_logits, no_partials, randomise, run_layers
from nas.serving.runtime import DTYPES, captured, compile_layers, fastest_rows
from nas.space import SearchSpace, Vector

_BEYOND_CACHES = 2**28  # bytes: more than any processor's own cache holds
_FEWEST_LAYERS = 4  # that are run for the time of one, unless the model has fewer
_MOST_COPIES = 16  # of embedding and head, in one timing


class LayerPool:
    """Layers of every number of groups in a space, and what runs them at a point."""

    def __init__(
        self, space: SearchSpace, dtype: str, runtime: str, device: torch.device, points: list[Point], memory_bytes: int
    ) -> None:
        shape = space.shape
        self._shape, self._runtime, self._dtype, self._device = shape, runtime, DTYPES[dtype], device
        self._generator = torch.Generator(device).manual_seed(0)
        self._depth, choices = shape.num_hidden_layers, space.levels
        self._layers = [self._make_position(choices) for _ in range(self._depth)]  # by position, then by groups
        # So many that no copy is still in the processor's cache when its turn comes again.
        head_bytes = shape.vocab_size * shape.hidden_size * self._dtype.itemsize
        copies = max(2, min(_MOST_COPIES, -(-_BEYOND_CACHES // head_bytes)))
        self._embeddings_and_heads = [self._make_embedding_and_head() for _ in range(copies)]
        cosines, sines = rope_table(shape)
        self._rope = cosines.to(device), sines.to(device)
        every_layer = [layer for position in self._layers for layer in position.values()]
        if runtime == "compiled":
            compile_layers(every_layer)
        tokens = max(
            p.batch * p.length if p.phase == "prefill" else padded_batches(p.batch, runtime)[-1] for p in points
        )
        self._tokens = torch.randint(shape.vocab_size, (tokens,), device=device, generator=self._generator)
        self._x_TD = self._random(tokens * shape.hidden_size).view(tokens, -1)
        self.step_rows: dict[int, int] = {}  # by batch, as far as was asked for

        # Memory for the keys and values of any point: what the largest takes, or as much as there is.
        modules = nn.ModuleList([*every_layer, *(module for copy in self._embeddings_and_heads for module in copy)])
        held_bytes = sum(parameter.nbytes for parameter in modules.parameters())  # each once
        fits = max(0, memory_bytes - held_bytes) // (2 * self._dtype.itemsize)
        vectors = [(p, p.groups * self._depth if p.part == "layer" else p.groups) for p in points]
        most = max(self._cache_size(vector, p.batch * p.length) for p, vector in vectors)
        self._room = min(fits, most)
        self._keys, self._values = (self._random(self._room) for _ in range(2))  # never time zeros
        self._graphs = torch.cuda.graph_pool_handle() if runtime != "eager" else None
        self._prepared: dict[Point, tuple[Callable[[], Any], int]] = {}  # keeps that pool alive, too

    def prepare(self, point: Point) -> tuple[Callable[[], Any], int]:
        """What runs a point, and by how much its time is to be divided; `torch.OutOfMemoryError` if it does not fit."""
        if point not in self._prepared:
            try:
                call, divisor = self._call(point)
                call()  # compiles, where that is asked for
                captures = self._runtime != "eager" and point.phase == "decode"
                self._prepared[point] = (captured(call, self._graphs) if captures else call), divisor
            except torch.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
                raise
        return self._prepared[point]

    def _call(self, point: Point) -> tuple[Callable[[], Any], int]:
        rows, length = point.batch, point.length
        last: Position = None
        if point.phase == "decode":
            if point.batch not in self.step_rows:
                self.step_rows[point.batch] = fastest_rows(self._layers[0].values(), point.batch, self._runtime)
            rows, length, last = self.step_rows[point.batch], 1, point.length - 1
            if self._runtime != "eager":
                last = torch.tensor(last, device=self._device)
        tokens_BT = self._tokens[: rows * length].view(rows, length)
        x_BTD = self._x_TD[: rows * length].view(rows, length, -1)
        copies, rope = self._embeddings_and_heads, self._rope
        if point.part == "embedding":
            return lambda: [embedding(tokens_BT) for embedding, _, _ in copies], len(copies)
        if point.part == "head":
            none = no_partials(x_BTD)
            return lambda: [last_logits(x_BTD, none, norm, head, last) for _, norm, head in copies], len(copies)
        vector = point.groups * self.depth_of(point) if point.part == "layer" else point.groups
        if not vector or self._cache_size(vector, point.batch * point.length) > self._room:
            raise torch.OutOfMemoryError(f"no room for the caches of {point.batch} x {point.length} tokens")
        layers = [position[groups] for position, groups in zip(self._layers, vector, strict=False)]
        caches = layer_caches(self._keys, self._values, self._shape, vector, point.batch, point.length)
        if point.part == "layer":
            return lambda: run_layers(layers, x_BTD, rope, caches, last), len(layers)
        embedding, norm, head = copies[0]

        def run_model() -> Tensor:
            return last_logits(*run_layers(layers, embedding(tokens_BT), rope, caches, last), norm, head, last)

        return run_model, 1

    def depth_of(self, point: Point) -> int:
        """How many layers are run for the time of one: all, or as many as there is room for; 0 if those are too few."""
        size = self._cache_size(point.groups, point.batch * point.length)
        fits = min(self._depth, self._room // size)
        read_bytes = fits * 2 * size * self._dtype.itemsize
        return fits if fits == self._depth or (fits >= _FEWEST_LAYERS and read_bytes >= _BEYOND_CACHES) else 0

    def fitting_batch(self, vector: Vector, batch: int, length: int) -> int:
        """The batch, or the largest whose caches there is room for."""
        return min(batch, self._room // self._cache_size(vector, length))

    def _cache_size(self, vector: Vector, tokens: int) -> int:
        """Elements of the keys, which are as many as those of the values."""
        return tokens * self._shape.kv_bytes_per_token(vector, dtype_bytes=1) // 2

    def _make_position(self, choices: Iterable[int]) -> dict[int, ServingLayer]:
        """Layers with random weights, which share all but those of queries, keys and values."""
        with torch.device("meta"):
            position = {groups: ServingLayer(self._shape.layer(groups)).eval() for groups in choices}
        first, *others = position.values()
        self._fill(first)
        for layer in others:
            layer.share(first)
            self._fill(layer)
        return position

    def _make_embedding_and_head(self) -> tuple[nn.Module, RMSNorm, nn.Module]:
        """Embedding, final norm and output head, whose weight lies as that of a `ServingModel`."""
        vocabulary, width = self._shape.vocab_size, self._shape.hidden_size
        linear = nn.Linear if self._shape.tie_word_embeddings else InputMajorLinear
        with torch.device("meta"):
            embedding, norm = nn.Embedding(vocabulary, width), RMSNorm(width, self._shape.rms_norm_eps)
            head = linear(width, vocabulary, bias=False)
        self._fill(nn.ModuleList([embedding, norm, head]))
        return embedding, norm, head

    def _fill(self, root: nn.Module) -> None:
        """Gives random weights to the modules that have none yet."""
        for module in root.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to(self._dtype).to_empty(device=self._device).requires_grad_(False)
                randomise(module, self._generator)

    def _random(self, count: int) -> Tensor:
        return torch.empty(count, device=self._device, dtype=self._dtype).normal_(generator=self._generator)
