"""Sharing rules: which K/V heads a supernet layer stores, and how each choice of groups is made from them.

K and V heads are linear in a layer's input, so any rule is a matrix: choice ``g`` of a layer reads ``g`` mixtures of
the S heads in store. A new rule is one class and one entry in `SHARING_RULES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class SharingRule(ABC):
    """How the choices of one layer, ascending, share stored K/V heads: unless a rule says otherwise, the largest's."""

    @abstractmethod
    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        """The (groups, S) matrix that makes the heads of choice ``groups`` out of the stored ones."""

    def from_largest(self, choices: Sequence[int]) -> Tensor:
        """The (S, C) matrix that makes the S stored heads out of a plain layer's C = max(choices) K/V heads."""
        return torch.eye(max(choices))


def pooling(heads: int, groups: int) -> Tensor:
    """The (groups, heads) matrix of means over neighbouring heads, as in arXiv 2305.13245.

    Group j covers the j-th of ``groups`` equal stretches of the heads: ``pooling(4, 2)`` is
    ``[[1/2, 1/2, 0, 0], [0, 0, 1/2, 1/2]]``. A head that lies in two stretches counts in each by the part that lies
    there: ``pooling(3, 2)`` is ``[[2/3, 1/3, 0], [0, 1/3, 2/3]]``.
    """
    group = torch.arange(groups).unsqueeze(1) * heads  # in units of 1 / groups of a head, so that all is whole
    head = torch.arange(heads) * groups
    overlap = (torch.minimum(group + heads, head + groups) - torch.maximum(group, head)).clamp(min=0)
    return overlap / heads


def mix_heads(mixture: Tensor, stacked: Tensor) -> Tensor:
    """Mixes heads that are stacked along the first axis of a projection's weight or bias.

    The mixture is (heads after, heads before), stacked is (heads before × d, …), and the result (heads after × d, …).
    """
    heads = stacked.unflatten(0, (mixture.shape[1], -1))
    mixed: Tensor = torch.tensordot(mixture.to(stacked), heads, dims=1)
    return mixed.flatten(0, 1)


class Sliced(SharingRule):
    """The heads of a choice are an evenly spaced subset: with choices 1, 2 and 4, head 0; heads 0 and 2; all four."""

    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        stored = max(choices)
        return torch.eye(stored)[[group * stored // groups for group in range(groups)]]


class Pooled(SharingRule):
    """The heads of a choice are means of neighbouring heads."""

    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        return pooling(max(choices), groups)


class Separate(SharingRule):
    """Every choice has K/V heads of its own: with choices 1, 2 and 4, seven are stored."""

    def mixture(self, choices: Sequence[int], groups: int) -> Tensor:
        before = sum(choice for choice in choices if choice < groups)
        return torch.eye(sum(choices))[before : before + groups]

    def from_largest(self, choices: Sequence[int]) -> Tensor:
        return torch.cat([pooling(max(choices), groups) for groups in choices])


SHARING_RULES: dict[str, SharingRule] = {"sliced": Sliced(), "pooled": Pooled(), "separate": Separate()}

DEFAULT_SHARING = "sliced"  # for a supernet that is trained from random weights
INIT_SHARING = "separate"  # for one that starts from a trained checkpoint: every choice keeps heads of its own
