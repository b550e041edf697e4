"""Training only the K/V heads of a supernet's smaller choices: the largest vector stays the checkpoint for ever.

The projections are split into rows that are trained, kept in fp32, and rows of the largest choice, which are frozen
like everything else and kept in the precision that computes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from nas.model import Supernet
from nas.model.decoder import Attention
from nas.space import SearchSpace


class _Rows(nn.Module):
    """A weight or bias as its first rows and the others."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, trained: Tensor, frozen: Tensor) -> Tensor:
        return torch.cat((trained.to(frozen.dtype), frozen))

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole[: self.rows].clone(), whole[self.rows :].clone()


def trained_parameters(space: SearchSpace) -> int:
    """How many parameters the K/V heads of the smaller choices have."""
    one = 2 * space.shape.layer(1).linears["k_proj"].parameters  # the K and V projections of one head
    return one * sum(sum(choices[:-1]) for choices in space.choices)


def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the parameters as they are, in ``dtype``; buffers, such as rotary tables, stay in fp32."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)


def train_smaller_heads(supernet: Supernet, dtype: torch.dtype) -> None:
    """Freezes a supernet of separate heads, in ``dtype``, but for the K/V heads of its smaller choices."""
    freeze(supernet, dtype)
    attentions = (module for module in supernet.modules() if isinstance(module, Attention))
    for attention, choices in zip(attentions, supernet.space.choices, strict=True):
        heads = sum(choices[:-1])
        for linear in (attention.k_proj, attention.v_proj) if heads else ():
            for name in [name for name, _ in linear.named_parameters()]:
                register_parametrization(linear, name, _Rows(heads * attention.head_dim), unsafe=True)
                trained = linear.get_parameter(f"parametrizations.{name}.original0")
                trained.data = trained.data.float()
                trained.requires_grad_(True)


def with_trained_heads(start: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dict before `train_smaller_heads`, with the rows that were trained since."""
    state = {**start}
    for name, rows in trained.items():
        if name.endswith(".original0"):  # and not what is tied to something frozen
            plain = name.replace(".parametrizations", "").removesuffix(".original0")
            state[plain] = torch.cat((rows, start[plain][len(rows) :]))
    return state
