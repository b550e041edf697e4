"""The runtimes that a model can be served on, and the runner that keeps a model, its cache and its graph together.

``eager``     PyTorch as it is: every operation is launched on its own.
``graph``     the decode step, with Triton's kernels between the GEMMs, captured in a CUDA graph: no launch overhead.
``compiled``  the same, with each layer compiled first: in prompts too, neighbouring operations become one kernel.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nas.hardware import check_compiler
from nas.serving.batching import prefill_chunks
from nas.serving.cache import KVCache
from nas.serving.cuda import captured
from nas.serving.layers import ServingModel
from nas.serving.rows import fastest_rows

RUNTIMES = ("eager", "graph", "compiled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles layers one by one: all of one number of groups share their kernels, for every batch and length."""
    check_compiler("(workload.)runtime=graph or eager")
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=True)


class Runner:
    """A model that serves one batch: prompts first, then token by token, as many as the cache has room for."""

    def __init__(self, model: ServingModel, cache: KVCache, runtime: str = "eager") -> None:
        self.model, self.cache, self.runtime = model, cache, runtime
        device = model.rope_cos.device
        with torch.inference_mode():
            rows = fastest_rows(model.serving_layers(), cache.batch, runtime)
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
        assert len(tokens_B) == self.cache.batch
        assert 0 <= position < self.cache.length
        if self.runtime == "eager":
            return self.model(tokens_B[:, None], self.cache.layers, position)  # type: ignore[no-any-return]
        self._tokens_B1[: len(tokens_B)] = tokens_B[:, None]
        self._last.fill_(position)
        if self._step is None:
            self._step = captured(lambda: self.model(self._tokens_B1, self.cache.layers, self._last))
        return self._step()[: len(tokens_B)]
