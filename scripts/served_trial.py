"""Trying out on a GPU what is predicted: does a vector fit at a batch within a cap on memory, and how fast is it?"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from torch import Tensor

from nas.latency.predictor import Workload
from nas.serving.batching import prefill_chunks
from nas.serving.cache import KVCache
from nas.serving.layers import ServingModel, randomise
from nas.serving.runtime import DTYPES, Runner, captured, milliseconds
from nas.shape import ModelShape

_COPIED_BYTES = (2**29, 2**31)


@contextmanager
def memory_cap(gib: float) -> Iterator[None]:
    """PyTorch gets no more than ``gib`` of the GPU's memory, what its allocator holds back included."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def served(shape: ModelShape, vector: Sequence[int], workload: Workload) -> Iterator["Trial"]:
    """A model with random weights that has read a chunk of prompts and decoded a step; freed again afterwards.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    release()
    trial = Trial()
    try:
        trial.begin(shape, vector, workload)
        yield trial
    finally:
        trial.runner = None  # whoever still holds the trial holds no memory
        release()


def fits(shape: ModelShape, vector: Sequence[int], workload: Workload) -> bool:
    """Whether `served` finds memory enough."""
    try:
        with served(shape, vector, workload):
            return True
    except torch.OutOfMemoryError:
        return False


class Trial:
    """Use `served`."""

    runner: Runner | None = None

    def begin(self, shape: ModelShape, vector: Sequence[int], workload: Workload) -> None:
        """Makes the model, lets it read a chunk of prompts, and decodes a step."""
        device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
        batch, dtype = int(workload.batch), DTYPES[workload.dtype]
        model = ServingModel(shape, vector, device, dtype)
        randomise(model, generator)
        cache = KVCache(shape, vector, batch, workload.context, device, dtype)
        for layer in cache.layers:  # never time zeros
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        read_once = sum(p.nbytes for part in (*model.layers, model.norm, model.lm_head) for p in part.parameters())
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        self.bytes_per_step = read_once + kept
        self._position, self.runner = workload.context - 1, Runner(model, cache, workload.runtime)
        rows = prefill_chunks(batch, workload.prompt)[0]
        tokens = torch.randint(shape.vocab_size, (batch, workload.prompt), device=device, generator=generator)
        logits_BV = torch.empty((batch, shape.vocab_size), device=device, dtype=dtype)  # that of all chunks
        self.runner.prefill(tokens[:rows])  # the others would take no more
        self._tokens_B = tokens[:, -1]
        self.step()
        torch.cuda.synchronize()
        del logits_BV

    def step(self) -> Tensor:
        """One token more for every sequence, at the last position of the context, chosen greedily."""
        assert self.runner is not None
        self._tokens_B = self.runner.decode(self._tokens_B, self._position).argmax(-1)
        return self._tokens_B

    def step_times_ms(self, rounds: int = 5, steps: int = 20) -> list[float]:
        """Milliseconds of a step, when one follows the other, in each of several rounds."""

        def run() -> None:
            for _ in range(steps):
                self.step()

        run()
        return [milliseconds(run) / steps for _ in range(rounds)]


def release() -> None:
    """Gives all memory that nothing refers to back to the GPU, compiled code's too."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the fastest of several large copies on the device."""
    best = 0.0
    for size in _COPIED_BYTES:
        source = torch.randn(size // 2, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        by_kernel, by_engine = partial(torch.mul, source, 1.0, out=target), partial(target.copy_, source)
        for copy in (by_kernel, by_engine):
            replay = captured(copy)
            best = max(best, 2e3 * size / median(milliseconds(replay) for _ in range(20)))
    return best
