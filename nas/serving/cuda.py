"""CUDA graphs and the time that a call takes the GPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def captured(call: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """The call as the replay of a CUDA graph, which returns what the captured call returned, in place.

    Args:
        call: Must read and write the same memory each time, and not wait for the device.
        pool: Memory to share with other graphs, none of whose results is read after another one has run.
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
