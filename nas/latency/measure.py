"""Measures the layers of a space: a pool of real layers, and the grid of points that they are timed at.

A layer timed alone would find its weights and cache in the processor's cache, where a whole model never finds them.
So the pool keeps as many layers of each ``g`` as the model has, each with its own weights and KV cache; a point runs
them one after the other and divides. Whole models of random vectors are put together from the same pool.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import Tensor

from nas.config import MeasureConfig
from nas.latency.model import DTYPE_BYTES, PHASES, LatencyModel, Phase, Workload, decode_ms, prefill_ms
from nas.latency.table import CHECK_COLUMNS, COLUMNS, summarise
from nas.latency.timing import time_side_by_side
from nas.model.decoder import Decoder, KVCache
from nas.space import SearchSpace, Vector, format_vector, parse_vector

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PREFILL_ROUNDS_SHARE = 0.4  # prefill is slower and steadier than decode


@dataclass(frozen=True)
class Grid:
    """The points of a table: every batch with every length, per phase."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]

    def lengths(self, phase: Phase) -> tuple[int, ...]:
        """Contexts of decode or prompts of prefill."""
        return self.contexts if phase == "decode" else self.prompts


def grid_for(config: MeasureConfig, workload: Workload) -> Grid:
    """The config's grid with the workload added; at least two values an axis, as interpolation needs."""

    def axis(given: list[int] | None, own: int, *defaults: int) -> tuple[int, ...]:
        values = {own, *(given if given is not None else defaults)}
        return tuple(sorted(values if len(values) > 1 else {own, max(1, own // 2), 2}))

    batch, context, prompt = workload.batch, workload.context, workload.prompt
    return Grid(
        axis(config.batches, batch, max(1, batch // 4)),
        axis(config.contexts, context, max(1, context // 4), max(1, context // 2)),
        axis(config.prompts, prompt, max(1, prompt // 2)),
    )


def pool_bytes(space: SearchSpace, grid: Grid, workload: Workload) -> int:
    """Bytes that a `LayerPool` takes at least: a model of every ``g``, and its caches."""
    size, tokens = DTYPE_BYTES[workload.dtype], max(grid.batches) * max(*grid.contexts, *grid.prompts)
    vectors = [(groups,) * space.shape.num_hidden_layers for groups in set().union(*space.choices)]
    models = size * sum(map(space.shape.parameters, vectors))
    return models + tokens * sum(space.shape.kv_bytes_per_token(vector, size) for vector in vectors)


class LayerPool:
    """Plain layers of every ``g`` of a space, with caches as large as the grid's largest point.

    Args:
        space: The search space.
        grid: Its largest batch and length size the caches.
        workload: Its dtype counts.
        device: Where the layers live.
    """

    def __init__(self, space: SearchSpace, grid: Grid, workload: Workload, device: torch.device) -> None:
        dtype = _DTYPES[workload.dtype]
        self._choices = sorted(set().union(*space.choices))
        batch, length, prompt = max(grid.batches), max(*grid.contexts, *grid.prompts), max(grid.prompts)
        depth = space.shape.num_hidden_layers
        generator = torch.Generator(device).manual_seed(0)
        self._models, self._caches = {}, {}
        for groups in self._choices:
            with torch.device(device):
                model = Decoder(space.shape, [groups] * depth)
            model.initialise(generator)
            self._models[groups] = model.to(dtype).eval()
            cache = KVCache(space.shape, model.kv_heads, batch, length, device, dtype)
            for layer in cache.layers:  # never time zeros
                layer.keys.normal_(generator=generator)
                layer.values.normal_(generator=generator)
            self._caches[groups] = cache
        width = space.shape.hidden_size
        self._x = torch.randn(batch, prompt, width, device=device, dtype=dtype, generator=generator)
        vocabulary = space.shape.vocab_size
        self._tokens = torch.randint(vocabulary, (batch, prompt), device=device, generator=generator)

    def layers(self, phase: Phase, groups: int, batch: int, length: int) -> Callable[[], Tensor]:
        """As many layers of one ``g`` in a row as the model has."""
        return self._body(phase, (groups,) * len(self._caches[groups].layers), batch, length)

    def ends(self, phase: Phase, batch: int, length: int) -> Callable[[], Tensor]:
        """Embedding of the tokens; final norm and head at the last position."""
        model = self._models[self._choices[0]]
        tokens = self._tokens_of(phase, batch, length)
        return lambda: model.lm_head(model.model.norm(model.model.embed_tokens(tokens)[:, -1:]))

    def whole(self, phase: Phase, vector: Vector, batch: int, length: int) -> Callable[[], Tensor]:
        """A whole model of ``vector``: tokens in, logits of the last position out."""
        model = self._models[self._choices[0]]
        tokens = self._tokens_of(phase, batch, length)
        body = self._body(phase, vector, batch, length, lambda: model.model.embed_tokens(tokens))
        return lambda: model.lm_head(model.model.norm(body()[:, -1:]))

    def _tokens_of(self, phase: Phase, batch: int, length: int) -> Tensor:
        return self._tokens[:batch, : length if phase == "prefill" else 1]

    def _body(
        self, phase: Phase, vector: Vector, batch: int, length: int, embed: Callable[[], Tensor] | None = None
    ) -> Callable[[], Tensor]:
        start = 0 if phase == "prefill" else length - 1
        tokens = length if phase == "prefill" else 1
        model = self._models[vector[0]]
        rope = tuple(table[start : start + tokens].to(self._x.dtype) for table in (model.rope_cos, model.rope_sin))
        x_BTD = self._x[:batch, :tokens]
        layers = [self._models[groups].model.layers[index] for index, groups in enumerate(vector)]
        caches = [self._caches[groups].rows(index, batch) for index, groups in enumerate(vector)]

        def call() -> Tensor:
            x = embed() if embed else x_BTD
            for layer, cache in zip(layers, caches, strict=True):
                x = layer(x, rope, None, cache, start)
            return x

        return call


@torch.inference_mode()
def measure(
    space: SearchSpace, grid: Grid, workload: Workload, config: MeasureConfig, check: int, device: torch.device
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Times every layer and both ends over the grid, and ``check`` whole models of random vectors at the workload.

    All are timed in the same shuffled rounds, so that a slow minute of the machine falls on parts and wholes alike.

    Returns:
        The table, with the columns of `nas.latency.table`; and the whole models, with all `CHECK_COLUMNS` but the last.
    """
    pool = LayerPool(space, grid, workload, device)
    rng = np.random.default_rng([config.seed, 1])
    vectors = sorted({tuple(int(rng.choice(allowed)) for allowed in space.choices) for _ in range(check)})
    parts, wholes = [], []
    for phase in PHASES:
        work = _work(pool, space, grid, phase)
        length = workload.context if phase == "decode" else workload.prompt
        for vector in vectors:
            work["whole", vector, workload.batch, length] = pool.whole(phase, vector, workload.batch, length)
        rounds = config.rounds if phase == "decode" else max(3, round(config.rounds * _PREFILL_ROUNDS_SHARE))
        samples = time_side_by_side(work, rounds, config.seed, device, workload.runtime == "graph", f"Timing {phase}")
        for (part, what, batch, length), seconds in samples.items():
            if part == "whole":
                wholes.append((phase, format_vector(what), batch, length, summarise(seconds)["median_ms"]))
            else:
                depth = space.shape.num_hidden_layers if part == "layer" else 1
                times = summarise([second / depth for second in seconds])
                parts.append({"phase": phase, "part": part, "groups": what, "batch": batch, "length": length} | times)
    table = pd.DataFrame(parts, columns=COLUMNS).sort_values(COLUMNS[:5], ignore_index=True)
    return table, pd.DataFrame(wholes, columns=CHECK_COLUMNS[:-1])


def _work(pool: LayerPool, space: SearchSpace, grid: Grid, phase: Phase) -> dict[tuple[Any, ...], Callable[[], object]]:
    """The parts of a model at every point of the grid, by (part, groups, batch, length)."""
    work: dict[tuple[Any, ...], Callable[[], object]] = {}
    for batch, length in itertools.product(grid.batches, grid.lengths(phase)):
        work["ends", 0, batch, length] = pool.ends(phase, batch, length)
        for groups in set().union(*space.choices):
            work["layer", groups, batch, length] = pool.layers(phase, groups, batch, length)
    return work


def predict_check(wholes: pd.DataFrame, predictor: LatencyModel, workload: Workload) -> pd.DataFrame:
    """Sets the prediction beside each measured whole model: `CHECK_COLUMNS`."""
    predict = {"decode": decode_ms, "prefill": prefill_ms}
    predicted = [
        predict[phase](predictor, parse_vector(vector), workload)
        for phase, vector in zip(wholes["phase"], wholes["vector"], strict=True)
    ]
    return wholes.assign(predicted_ms=predicted)


def summarise_check(check: pd.DataFrame) -> dict[str, dict[str, float]]:
    """By phase: over how many models, mean and worst absolute relative error, and Kendall τ where there is one."""
    return {str(phase): _summarise_phase(rows) for phase, rows in check.groupby("phase")}


def _summarise_phase(rows: pd.DataFrame) -> dict[str, float]:
    errors = (rows["predicted_ms"] / rows["measured_ms"] - 1).abs()
    tau = kendalltau(rows["predicted_ms"], rows["measured_ms"]).statistic if len(rows) > 1 else np.nan
    ranking = {"kendall_tau": float(tau)} if np.isfinite(tau) else {}  # nor is there one where all predictions tie
    return {"n": len(rows), "mape": float(errors.mean()), "worst": float(errors.max())} | ranking
