"""The loss of vectors on a fixed set of validation windows, remembered on disk by vector.

On a CPU it is computed in fp32, eagerly. On a GPU the layers are compiled and run in fp16, but for residual stream,
norms and logits: it rounds eight times finer than bf16, which small differences between vectors need
(scripts/bench_evaluation.py compares both). What exceeds fp16's range becomes infinite, and is computed again in fp32.

Shape suffixes: B rows, N windows, V vectors, T tokens, W words of the vocabulary.
"""

import base64
import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from nas import console
from nas.errors import UserError
from nas.files import append_json_lines
from nas.metrics import PAIRED_SE, Metrics
from nas.model import Supernet
from nas.shape import ModelShape
from nas.space import Vector, format_vector

_TOKENS = 8192  # in one forward pass on a CPU; their logits are what takes memory
_GPU_TOKENS = 65536  # on a GPU, if a quarter of its free memory holds their activations

Windows = npt.NDArray[np.float32]  # losses of the windows, (N,)


def row_losses(logits_BTW: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean loss of each row in nats per token, shape (B,)."""
    losses = F.cross_entropy(logits_BTW.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    return losses.view(targets_BT.shape).mean(1)


@torch.no_grad()
def plain_losses(logits_of: Callable[[Tensor], Tensor], windows_NT: Tensor) -> Tensor:
    """Losses (N,), nats per token, on windows of T + 1 ids, of a model from ids (rows, T) to logits (rows, T, W)."""
    rows = max(1, _TOKENS // windows_NT.shape[1])
    return torch.cat([row_losses(logits_of(part[:, :-1]), part[:, 1:]) for part in windows_NT.split(rows)])


def mean_loss(logits_of: Callable[[Tensor], Tensor], windows_NT: Tensor) -> float:
    """The mean of `plain_losses`."""
    return float(plain_losses(logits_of, windows_NT).double().mean())


def vector_losses(supernet: Supernet, vectors: Sequence[Vector], windows_NT: Tensor) -> list[float]:
    """`mean_loss` of a supernet at each vector."""
    rows = max(1, _TOKENS // windows_NT.shape[1])
    means: list[float] = window_losses(supernet, vectors, windows_NT, rows).double().mean(1).tolist()
    return means


@torch.no_grad()
def window_losses(supernet: Supernet, vectors: Iterable[Vector], windows_NT: Tensor, rows: int) -> Tensor:
    """Loss of a supernet at each vector on each window of T + 1 ids, (V, N), in passes of at most so many rows.

    Vectors that share their first layers share those layers' work (`Supernet.shared_losses`). So every pass takes as
    many vectors as fit, and only then several windows.
    """
    losses: dict[Vector, Tensor] = {}
    for batch in _batches(vectors, rows):
        pieces = windows_NT.split(_evenly(len(windows_NT), max(1, rows // len(batch))))
        losses |= zip(batch, torch.cat([supernet.shared_losses(piece, batch) for piece in pieces], dim=1), strict=True)
    return torch.stack([losses[vector] for vector in vectors])


def _batches(vectors: Iterable[Vector], rows: int) -> Iterator[list[Vector]]:
    """The distinct vectors in lexicographic order, as many at a time as go through the model together."""
    ordered = sorted(set(vectors))
    size = _evenly(len(ordered), rows)
    return (ordered[at : at + size] for at in range(0, len(ordered), size))


def _evenly(count: int, most: int) -> int:
    """The size of at most ``most`` that cuts ``count`` into few and equal pieces: of one shape, compiled once."""
    return math.ceil(count / max(1, math.ceil(count / most))) or 1


class LossMemo(dict[str, float]):
    """Losses (nats per token) by name, remembered in a file of JSON lines, whose last one a kill may cut short.

    ``windows`` has the losses of the single validation windows, as far as they were told.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.windows = file, dict[str, Windows]()
        self.reload()

    def reload(self) -> Self:
        """Takes in what other processes have added."""
        text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.is_file() else ""
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if "windows" in entry:
                    self.windows[str(entry["name"])] = np.frombuffer(base64.b64decode(entry["windows"]), "<f4")
                self[str(entry["name"])] = float(entry["loss_nats"])
        return self

    def add(self, losses: Mapping[str, float], windows: Mapping[str, Windows] = {}) -> None:
        """Remembers losses, in the file too."""
        self.update(losses)
        self.windows.update(windows)
        lines: dict[str, dict[str, Any]] = {name: {"name": name, "loss_nats": loss} for name, loss in losses.items()}
        for name, values in windows.items():
            lines[name]["windows"] = base64.b64encode(values.astype("<f4").tobytes()).decode()
        append_json_lines(self.file, lines.values())


class InheritedLoss:
    """Inherited loss of vectors in nats per token, on validation windows of T + 1 tokens and the supernet's device.

    The supernet is from then on this object's: on a GPU its layers are compiled.
    """

    def __init__(self, supernet: Supernet, windows_NT: Tensor, memo: LossMemo) -> None:
        self.supernet, self.memo = supernet.eval(), memo  # which must be of this supernet and these windows alone
        device = supernet.decoder.rope_cos.device
        self.windows = windows_NT.to(device)
        self.rows = self._few = max(1, _TOKENS // windows_NT.shape[1])  # in one pass
        self.precision = evaluated_in(device)
        if self.precision == "fp16":
            gc.collect()
            torch.cuda.empty_cache()  # what a training before this has left
            tokens = min(_GPU_TOKENS, torch.cuda.mem_get_info()[0] // (4 * _activation_bytes(supernet.space.shape)))
            self.rows = max(1, tokens // (windows_NT.shape[1] - 1))
            with suppress(UserError):  # without a compiler it is slower, no more
                supernet.decoder.compile_layers()

    def __call__(self, vector: Vector) -> float:
        name = format_vector(vector)
        return self.memo[name] if name in self.memo else self._evaluate([vector])[0]

    def of(self, vectors: Sequence[Vector]) -> list[float]:
        """Losses of many vectors, far faster than one by one if they share their first layers."""
        missing = {vector for vector in vectors if format_vector(vector) not in self.memo}
        before = len(self.memo)
        with console.progress_bar("Evaluating vectors", len(missing)) as bar:
            for batch in _batches(missing, self.rows):
                self._evaluate(batch)
                bar(len(self.memo) - before)
        return [self.memo[format_vector(vector)] for vector in vectors]

    def noise(self, vector: Vector) -> Metrics:
        """Standard error (nats) of the difference between an evaluated vector's loss and the largest vector's.

        Both are means over the same windows, so it is that of the mean of the windows' differences. Unknown for a
        single window, and for a loss that was taken over without those of its windows.
        """
        windows, largest = self.memo.windows, self.supernet.space.largest
        own = windows.get(format_vector(vector))
        if own is None or len(own) < 2:
            return {}
        if format_vector(largest) not in windows:
            self._evaluate([largest])
        differences = own.astype(float) - windows[format_vector(largest)]
        return {PAIRED_SE: float(differences.std(ddof=1)) / math.sqrt(len(differences))}

    def _evaluate(self, vectors: list[Vector]) -> list[float]:
        in_half = self.precision == "fp16"
        with on_tensor_cores(self.windows.device) if in_half else nullcontext():
            losses_VN = window_losses(self.supernet, vectors, self.windows, self.rows)
        if in_half and not losses_VN.isfinite().all():  # beyond the range of fp16
            losses_VN = window_losses(self.supernet, vectors, self.windows, self._few)
        losses: list[float] = losses_VN.double().mean(1).tolist()
        names = list(map(format_vector, vectors))
        self.memo.add(dict(zip(names, losses, strict=True)), dict(zip(names, losses_VN.cpu().numpy(), strict=True)))
        return losses


def evaluated_in(device: torch.device) -> str:
    """The precision of inherited losses on a device, fp16 or fp32: they are not to be mixed."""
    return "fp16" if device.type == "cuda" else "fp32"


@contextmanager
def on_tensor_cores(device: torch.device, dtype: torch.dtype = torch.float16) -> Iterator[None]:
    """Linear layers and attention in ``dtype``; what stays in fp32, as the logits do, by TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _activation_bytes(shape: ModelShape) -> int:
    """That a token takes in a layer, at most."""
    return 32 * max(shape.hidden_size, shape.num_attention_heads * shape.head_dim) + 8 * shape.intermediate_size
