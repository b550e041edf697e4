"""The runtimes that a model can be served on, and the runner that keeps a model, its cache and its graph together.

``eager``     PyTorch as it is: every operation is launched on its own.
``graph``     the decode step, with Triton's kernels between the GEMMs, captured in a CUDA graph: no launch overhead.
``compiled``  the same, with each layer compiled first: in prompts too, neighbouring operations become one kernel.

A step in a CUDA graph computes the batch, or a few rows more where that is faster. Which kernel cuBLAS takes depends on
the number of rows, and not always to the best: on an H100, 144 rows of a wide MLP took a fifth longer than 160. So a
layer's GEMMs are timed; attention leaves the additional rows out.
"""

import functools
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from nas import hardware
from nas.serving.batching import padded_batches, prefill_chunks
from nas.serving.cache import KVCache
from nas.serving.layers import ServingLayer, ServingModel, split_k_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ROUNDS, _REPEATS = 6, 4  # the first round warms up
_ALIKE = 1.01  # times that differ by less do not count as different


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles layers: all of one number of groups share their kernels, for every batch and length."""
    hardware.compile_layers(layers, "(workload.)runtime=graph or eager", dynamic=True)


class Runner:
    """A model that serves one batch: prompts first, then token by token, as many as the cache has room for."""

    def __init__(self, model: ServingModel, cache: KVCache, runtime: str = "eager") -> None:
        self.model, self.cache, self.runtime = model, cache, runtime
        device = model.rope_cos.device
        with torch.inference_mode():
            rows = fastest_rows(model.layers, cache.batch, runtime)
        self._tokens_B1 = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._last = torch.zeros((), dtype=torch.long, device=device)
        self._step: Callable[[], Tensor] | None = None
        if runtime == "compiled":
            compile_layers(model.layers)

    @torch.inference_mode()
    def prefill(self, tokens_BT: Tensor) -> Tensor:
        """Puts prompts into the cache, in `prefill_chunks`; logits BV of their last tokens."""
        logits_BV = self.model.lm_head.weight.new_empty((len(tokens_BT), self.model.shape.vocab_size))
        begin = 0
        for chunk_BT in tokens_BT.split(prefill_chunks(*tokens_BT.shape)):
            end = begin + len(chunk_BT)
            logits_BV[begin:end] = self.model(chunk_BT, self.cache.rows(begin, end))
            begin = end
        return logits_BV

    @torch.inference_mode()
    def decode(self, tokens_B: Tensor, position: int) -> Tensor:
        """One more token for every row, at ``position``; logits BV, which the next step overwrites."""
        assert len(tokens_B) == self.cache.batch and 0 <= position < self.cache.length
        if self.runtime == "eager":
            return self.model(tokens_B[:, None], self.cache.layers, position)  # type: ignore[no-any-return]
        self._tokens_B1[: len(tokens_B)] = tokens_B[:, None]
        self._last.fill_(position)
        if self._step is None:
            self._step = captured(lambda: self.model(self._tokens_B1, self.cache.layers, self._last))
        return self._step()[: len(tokens_B)]


def fastest_rows(layers: Iterable[ServingLayer], batch: int, runtime: str) -> int:
    """The least of `padded_batches` that the GEMMs of the layer with the fewest groups are fastest at."""
    candidates = padded_batches(batch, runtime)
    if len(candidates) == 1:
        return batch
    run, pool = _gemms(min(layers, key=lambda layer: layer.groups), candidates[-1]), torch.cuda.graph_pool_handle()
    # Captured, as launching one by one may take the host longer; and all in turn, as clocks move.
    steps = {rows: captured(functools.partial(run, rows), pool) for rows in candidates}
    rounds = [{rows: milliseconds(step) for rows, step in steps.items()} for _ in range(_ROUNDS)]
    times = {rows: median(taken[rows] for taken in rounds[1:]) for rows in candidates}
    del run, steps  # and their inputs, whose memory blocks suit nothing else
    torch.cuda.empty_cache()
    return min(rows for rows in candidates if times[rows] < _ALIKE * min(times.values()))


def _gemms(layer: ServingLayer, most: int) -> Callable[[int], None]:
    """The GEMMs of a decode step of so many rows, a few times over; more weights than a GPU's cache holds."""
    from nas.serving.gemm import gate_up_swiglu

    linears = (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
    inputs = [linear.weight.new_empty((most, linear.in_features)).normal_() for linear in linears]

    def run(rows: int) -> None:
        for_qkv, for_o, for_gate_up, for_down = (x[:rows] for x in inputs)
        for _ in range(_REPEATS):
            split_k_linear(for_qkv, layer.qkv_proj)
            split_k_linear(for_o, layer.o_proj)
            gate_up_swiglu(for_gate_up, layer.gate_up_proj.weight, layer.gate_up_proj.bias)
            split_k_linear(for_down, layer.down_proj)

    return run


def captured(call: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """The call as the replay of a CUDA graph, which returns what the captured call returned, in place.

    It must read and write the same memory each time, and not wait for the device. A pool is memory to share with other
    graphs, none of whose results is read after another one has run.
    """
    stream = _warm_up_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and lets libraries choose
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()

    def replay(_alive: Callable[[], Any] = call) -> Any:  # the call keeps alive what the graph reads
        graph.replay()
        return result

    return replay


@functools.cache
def _warm_up_stream() -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace of 32 MiB for each stream that it ever ran on."""
    return torch.cuda.Stream()


def milliseconds(call: Callable[[], object]) -> float:
    """What a call takes the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
