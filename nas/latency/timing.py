"""Timing callables side by side: in rounds, in shuffled order, so that a machine's drift falls on all alike."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from nas.console import progress_bar

Key = TypeVar("Key", bound=Hashable)
_SHORTEST_SECONDS = 2e-3  # a sample repeats a faster callable until it lasts this long


def time_side_by_side(
    work: Mapping[Key, Callable[[], object]], rounds: int, seed: int, device: torch.device, graph: bool, title: str
) -> dict[Key, list[float]]:
    """Times every callable once a round.

    Args:
        work: What to time, by key.
        rounds: How many samples each gets.
        seed: Seeds the order.
        device: Where the work runs.
        graph: Capture each callable in a CUDA graph and time its replay, so that launch overhead does not count.
        title: For the progress bar.

    Returns:
        Seconds of one call, ``rounds`` samples a key.
    """
    pool = torch.cuda.graph_pool_handle() if graph else None  # shared: no graph's output is ever read
    ready = {key: _capture(call, pool) if graph else call for key, call in work.items()}
    repeats = {key: _repeats(call, device) for key, call in ready.items()}
    samples: dict[Key, list[float]] = {key: [] for key in work}
    order = random.Random(seed)
    with progress_bar(title, rounds * len(work)) as bar:
        for round_ in range(rounds):
            keys = list(ready)
            order.shuffle(keys)
            for index, key in enumerate(keys):
                samples[key].append(_sample(ready[key], repeats[key], device))
                bar.update(round_ * len(keys) + index + 1)
    return samples


def _sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def _repeats(call: Callable[[], object], device: torch.device) -> int:
    _sample(call, 1, device)  # warm-up
    return max(1, round(_SHORTEST_SECONDS / max(_sample(call, 1, device), 1e-7)))


def _capture(call: Callable[[], object], pool: Any) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay
