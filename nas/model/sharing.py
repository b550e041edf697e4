"""Sharing rules: which K/V heads a supernet layer stores, and how each choice of groups is made from them.

K and V heads are linear in a layer's input, so any rule is a matrix: choice ``g`` of a layer reads ``g`` mixtures of
the S heads in store. A new rule is one class and one entry in `SHARING_RULES`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class SharingRule(Protocol):
    """How the choices of one layer share stored K/V heads."""

    def stored_heads(self, choices: Sequence[int]) -> int:
        """S, the number of K/V heads that a layer with these choices keeps as weights."""

    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        """The (groups, S) matrix that makes the heads of choice ``groups`` out of the stored ones."""


class Sliced:
    """The heads of a choice are an evenly spaced subset of the largest choice's heads.

    With choices 1, 2 and 4: head 0; heads 0 and 2; all four.
    """

    def stored_heads(self, choices: Sequence[int]) -> int:
        return max(choices)

    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        stored = self.stored_heads(choices)
        heads = [group * stored // groups for group in range(groups)]
        return torch.eye(stored)[heads]


SHARING_RULES: dict[str, SharingRule] = {"sliced": Sliced()}
