"""The loss of vectors on a fixed set of validation windows, remembered on disk by vector."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.errors import UserError
from nas.model import Supernet
from nas.space import Vector, format_vector, parse_vector

_TOKENS = 8192  # in one forward pass; their logits are what takes memory


@torch.no_grad()
def mean_loss(logits_of: Callable[[Tensor], Tensor], windows_NT: Tensor) -> float:
    """Mean loss in nats a token.

    Args:
        logits_of: Maps token ids (rows, T) to logits (rows, T, V).
        windows_NT: Token ids, T + 1 a window: inputs and the targets one to the right.
    """
    total = 0.0
    for rows in windows_NT.split(max(1, _TOKENS // windows_NT.shape[1])):
        total += row_losses(logits_of(rows[:, :-1]), rows[:, 1:]).double().sum().item()
    return total / len(windows_NT)


def vector_loss(supernet: Supernet, vector: Vector, windows_NT: Tensor) -> float:
    """`mean_loss` of a supernet at one vector."""
    choices_1L = supernet.choice_indices([vector])
    return mean_loss(lambda tokens: supernet(tokens, choices_1L.expand(len(tokens), -1)), windows_NT)


def row_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean loss of each row in nats a token, shape (B,)."""
    losses = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    return losses.view(targets_BT.shape).mean(1)


class InheritedLoss:
    """Inherited loss of vectors: the supernet's, with no further training.

    Args:
        supernet: The supernet, on the device where it shall run.
        windows_NT: Validation windows, T + 1 tokens each.
        memo: A file that remembers losses; it must belong to this supernet and these windows alone.
    """

    def __init__(self, supernet: Supernet, windows_NT: Tensor, memo: Path) -> None:
        self.supernet = supernet.eval()
        self.windows = windows_NT.to(supernet.decoder.rope_cos.device)
        self.memo = memo
        self._known: dict[Vector, float] = {}
        for line in memo.read_text(encoding="utf-8", errors="replace").splitlines() if memo.is_file() else []:
            with suppress(ValueError, KeyError, TypeError, UserError):  # a line that a kill cut short
                entry = json.loads(line)
                self._known[parse_vector(entry["vector"])] = entry["loss_nats"]

    def __call__(self, vector: Vector) -> float:
        """Loss in nats a token."""
        if vector not in self._known:
            self._known[vector] = vector_loss(self.supernet, vector, self.windows)
            self.memo.parent.mkdir(parents=True, exist_ok=True)
            with self.memo.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"vector": format_vector(vector), "loss_nats": self._known[vector]}) + "\n")
        return self._known[vector]
