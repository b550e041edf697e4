"""How many rows a decode step in a CUDA graph computes: the batch, or a few more where that is faster.

Which kernel cuBLAS takes depends on the number of rows, and not always to the best: on an H100, 144 rows of a wide MLP
took a fifth longer than 160. So what a layer's products take is timed; attention leaves the additional rows out.
"""

from collections.abc import Callable
from statistics import median

import torch

from nas.latency.model import filled_up
from nas.serving.model import ServingLayer, product_in_halves

_ROUNDS, _REPEATS = 6, 4  # the first round warms up


def fastest_rows(layer: ServingLayer, batch: int, runtime: str) -> int:
    """The one of `filled_up` that a layer's products are fastest at."""
    candidates = filled_up(batch, runtime)
    if len(candidates) == 1:
        return batch
    products = {rows: _products(layer, rows) for rows in candidates}
    rounds = [
        {rows: milliseconds(products[rows]) for rows in candidates} for _ in range(_ROUNDS)
    ]  # in turn: clocks move
    return min(candidates, key=lambda rows: median(times[rows] for times in rounds[1:]))


def milliseconds(call: Callable[[], object]) -> float:
    """What a call takes the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _products(layer: ServingLayer, rows: int) -> Callable[[], None]:
    """The four products of a decode step, more weights than a GPU's cache holds, a few times over."""
    linears = (layer.qkv_proj, layer.o_proj, layer.gate_up_proj)
    inputs = [layer.o_proj.weight.new_empty((rows, linear.in_features)).normal_() for linear in linears]
    inner = inputs[0].new_empty((rows, layer.down_proj.in_features)).normal_()

    def run() -> None:
        for _ in range(_REPEATS):  # one after the other: launching takes no time of its own
            for linear, x in zip(linears, inputs, strict=True):
                linear(x)
            product_in_halves(inner, layer.down_proj)

    return run
