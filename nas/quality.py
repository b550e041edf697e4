"""The loss of vectors on a fixed set of validation windows, remembered on disk by vector.

Shape suffixes: B rows, N windows, V vectors, T tokens, W words of the vocabulary.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nas import console
from nas.files import append_json_lines
from nas.model import Supernet
from nas.space import Vector, format_vector

_TOKENS = 8192  # in one forward pass; their logits are what takes memory


def row_losses(logits_BTW: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean loss of each row in nats per token, shape (B,)."""
    losses = F.cross_entropy(logits_BTW.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    return losses.view(targets_BT.shape).mean(1)


@torch.no_grad()
def mean_loss(logits_of: Callable[[Tensor], Tensor], windows_NT: Tensor) -> float:
    """Mean loss (nats per token), on windows of T + 1 ids, of a model from ids (rows, T) to logits (rows, T, V)."""
    rows = _rows_at_once(windows_NT)
    losses = [row_losses(logits_of(windows[:, :-1]), windows[:, 1:]) for windows in windows_NT.split(rows)]
    return float(torch.cat(losses).double().mean())


@torch.no_grad()
def vector_losses(supernet: Supernet, vectors: Sequence[Vector], windows_NT: Tensor) -> list[float]:
    """`mean_loss` of a supernet at each vector, in forward passes of many vectors that share their first layers.

    Every pass takes as many vectors as fit, and only then several windows, for vectors share work and windows do not.
    """
    losses: dict[Vector, float] = {}
    for batch in _batches(vectors, windows_NT):
        losses_VN = []
        for windows in windows_NT.split(max(1, _rows_at_once(windows_NT) // len(batch))):
            logits_VNTW = supernet.shared_forward(windows[:, :-1], batch)
            targets = windows[:, 1:].repeat(len(batch), 1)
            losses_VN.append(row_losses(logits_VNTW.flatten(0, 1), targets).view(len(batch), -1))
        losses |= zip(batch, torch.cat(losses_VN, dim=1).double().mean(1).tolist(), strict=True)
    return [losses[vector] for vector in vectors]


def _rows_at_once(windows_NT: Tensor) -> int:
    return max(1, _TOKENS // windows_NT.shape[1])


def _batches(vectors: Iterable[Vector], windows_NT: Tensor) -> Iterator[list[Vector]]:
    """The distinct vectors in lexicographic order, as many at a time as go through the model together."""
    ordered, most = sorted(set(vectors)), _rows_at_once(windows_NT)
    return (ordered[at : at + most] for at in range(0, len(ordered), most))


class LossMemo(dict[str, float]):
    """Losses (nats per token) by name, remembered in a file of JSON lines, whose last one a kill may cut short."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.reload()

    def reload(self) -> Self:
        """Takes in what other processes have added."""
        text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.is_file() else ""
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self[str(entry["name"])] = float(entry["loss_nats"])
        return self

    def add(self, losses: Mapping[str, float]) -> None:
        """Remembers losses, in the file too."""
        self.update(losses)
        append_json_lines(self.file, ({"name": name, "loss_nats": loss} for name, loss in losses.items()))


class InheritedLoss:
    """Inherited loss of vectors in nats per token, on validation windows of T + 1 tokens and the supernet's device."""

    def __init__(self, supernet: Supernet, windows_NT: Tensor, memo: LossMemo) -> None:
        self.supernet, self.memo = supernet.eval(), memo  # which must be of this supernet and these windows alone
        self.windows = windows_NT.to(supernet.decoder.rope_cos.device)

    def __call__(self, vector: Vector) -> float:
        name = format_vector(vector)
        return self.memo[name] if name in self.memo else self._evaluate([vector])[0]

    def of(self, vectors: Sequence[Vector]) -> list[float]:
        """Losses of many vectors, far faster than one by one if they share their first layers."""
        missing = {vector for vector in vectors if format_vector(vector) not in self.memo}
        before = len(self.memo)
        with console.progress_bar("Evaluating vectors", len(missing)) as bar:
            for batch in _batches(missing, self.windows):
                self._evaluate(batch)
                bar(len(self.memo) - before)
        return [self.memo[format_vector(vector)] for vector in vectors]

    def _evaluate(self, vectors: list[Vector]) -> list[float]:
        losses = vector_losses(self.supernet, vectors, self.windows)
        self.memo.add(dict(zip(map(format_vector, vectors), losses, strict=True)))
        return losses
