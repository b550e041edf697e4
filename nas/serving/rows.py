"""How many rows a decode step in a CUDA graph computes: the batch, or a few more where that is faster.

Which kernel cuBLAS takes depends on the number of rows, and not always to the best: on an H100, 144 rows of a wide MLP
took a fifth longer than 160. So a layer's GEMMs are timed; attention leaves the additional rows out.
"""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch

from nas.serving.batching import padded_batches
from nas.serving.cuda import captured, milliseconds
from nas.serving.layers import ServingLayer, split_k_linear

_ROUNDS, _REPEATS = 6, 4  # the first round warms up
_ALIKE = 1.01  # times that differ by less do not count as different


def fastest_rows(layers: Iterable[ServingLayer], batch: int, runtime: str) -> int:
    """The least of `padded_batches` that the GEMMs of the layer with the fewest groups are fastest at."""
    candidates = padded_batches(batch, runtime)
    if len(candidates) == 1:
        return batch
    run, pool = _gemms(min(layers, key=lambda layer: layer.groups), candidates[-1]), torch.cuda.graph_pool_handle()
    # Captured, as launching one by one may take the host longer; and all in turn, as clocks move.
    steps = {rows: captured(partial(run, rows), pool) for rows in candidates}
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
