"""Training only what a supernet's smaller choices have alone: the largest vector stays the checkpoint for ever.

That is their K/V heads, and their corrections of the output projection if there are any. The K/V projections are split
into rows that are trained, kept in fp32, and rows of the largest choice, which are frozen like everything else and kept
in the precision that computes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.model import Supernet


class _PartlyTrained(nn.Module):
    """A linear layer as its first rows, which are trained, and the others: weights, then biases if it has any.

    A class of its own, and no parametrisation, which would be another class for every layer: the compiler could then
    not share a graph between layers.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        whole = [parameter.detach() for parameter in linear.parameters()]
        self.trained = nn.ParameterList(nn.Parameter(tensor[:rows].float()) for tensor in whole)
        self.frozen = nn.ParameterList(nn.Parameter(tensor[rows:].clone(), requires_grad=False) for tensor in whole)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.trained, self.frozen, strict=True)
        return F.linear(x, *(torch.cat((trained.to(frozen.dtype), frozen)) for trained, frozen in pairs))


def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the parameters as they are, in ``dtype``; buffers, such as rotary tables, stay in fp32."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)


def train_smaller_heads(supernet: Supernet, dtype: torch.dtype) -> None:
    """Freezes a supernet of separate heads, in ``dtype``, but for what its smaller choices have alone."""
    freeze(supernet, dtype)
    for layer, choices in zip(supernet.decoder.model.layers, supernet.space.choices, strict=True):
        attention = layer.self_attn
        if rows := sum(choices[:-1]) * attention.head_dim:
            attention.k_proj = _PartlyTrained(attention.k_proj, rows)  # type: ignore[assignment]
            attention.v_proj = _PartlyTrained(attention.v_proj, rows)  # type: ignore[assignment]
        if attention.correction is not None:
            attention.correction.requires_grad_(True).float()


def with_trained_heads(start: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dict before `train_smaller_heads`, with what was trained since."""
    state = {**start}
    for name, rows in trained.items():
        layer, _, number = name.partition(".trained.")
        if ".correction." in name:
            state[name] = rows
        elif number:  # and not what is tied to something frozen
            plain = f"{layer}.{('weight', 'bias')[int(number)]}"
            state[plain] = torch.cat((rows, start[plain][len(rows) :]))
    return state
