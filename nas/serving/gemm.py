"""The matrix products of a decode step's layers, as far as the kernel that comes next takes them in parts.

All but the MLP's first product are two terms, each the sum over half of the inputs: one sum of few rows and many inputs
would leave multiprocessors idle, and the next kernel adds the terms for nothing. Gate, up and SwiGLU are one kernel, as
a program computes the same columns of both.

On GPUs of the kind that they were tuned for, few rows are for Triton's kernels, which start early. More rows than a
program's tile are left to cuBLAS, whose programs share what they read.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
from typing import NamedTuple

import torch
import torch.nn.functional as F_
import triton
import triton.language as tl
from torch import Tensor

from nas.serving.elementwise import swiglu
from nas.serving.launch import MOST_ROWS, is_hopper, launch_dependents, starting_early, wait


class Tile(NamedTuple):
    """What a program of a product computes at a time, as an H100 was fastest with it.

    Attributes:
        columns: Outputs; of gate, and as many of up.
        inputs: Terms of their sums.
        warps: That share the work.
        stages: Of the pipeline: so many blocks of inputs less one are read ahead.
        most_rows: Beyond which cuBLAS was the faster.
    """

    columns: int
    inputs: int
    warps: int
    stages: int
    most_rows: int = MOST_ROWS


_GATED = Tile(columns=128, inputs=32, warps=8, stages=5)
_HALVES = Tile(columns=64, inputs=64, warps=4, stages=6)
_WIDE = Tile(columns=128, inputs=64, warps=4, stages=5, most_rows=64)  # halves of more outputs than inputs


@triton.jit
def _gated(
    x_ptr, weight_ptr, out_ptr, rows, D, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A block of columns, all rows."""
    b, d, f = tl.arange(0, ROWS), tl.arange(0, INPUTS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += b[:, None] * D + d
    weight_ptr += d[:, None].to(tl.int64) * 2 * F + f
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait(EARLY)
    launch_dependents(EARLY)
    for _ in range(0, D, INPUTS):
        x = tl.load(x_ptr, mask=b[:, None] < rows, other=0.0)
        gate = tl.dot(x, tl.load(weight_ptr), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(weight_ptr + F), up, input_precision="ieee")
        x_ptr += INPUTS
        weight_ptr += INPUTS * 2 * F
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + b[:, None] * F + f, out, mask=b[:, None] < rows)


@triton.jit
def _half(
    x_ptr, weight_ptr, out_ptr, rows, F, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A block of columns of one term, all rows."""
    b, d = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    f = tl.program_id(1) * (F // 2) + tl.arange(0, INPUTS)
    x_ptr += b[:, None] * F + f
    weight_ptr += f[:, None].to(tl.int64) * D + d
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait(EARLY)
    launch_dependents(EARLY)
    for _ in range(0, F // 2, INPUTS):
        x = tl.load(x_ptr, mask=b[:, None] < rows, other=0.0)
        total = tl.dot(x, tl.load(weight_ptr), total, input_precision="ieee")
        x_ptr += INPUTS
        weight_ptr += INPUTS * D
    out_ptr += tl.program_id(1).to(tl.int64) * rows * D + b[:, None] * D + d
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=b[:, None] < rows)


@torch.library.custom_op("nas::gated", mutates_args=())
def gated(x_BD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the first half of a linear layer's outputs times the second; contiguous, BF.

    Args:
        x_BD: The layer's inputs.
        weight: Its weight (2F, D), laid out input by input.
        bias: Its bias (2F), if it has one.
    """
    if bias is None and _is_for_triton(x_BD, weight, x_BD.shape[1], len(weight) // 2, _GATED):
        return gated_in_triton(x_BD, weight)
    return swiglu(F_.linear(x_BD, weight, bias))


@gated.register_fake
def _(x_BD: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
    return x_BD.new_empty((x_BD.shape[0], weight.shape[0] // 2))


@torch.library.custom_op("nas::halves", mutates_args=())
def halves(x_BF: Tensor, weight: Tensor) -> Tensor:
    """A product as two terms (2BD), each the sum over half of F; an odd F gives one term.

    Args:
        x_BF: The inputs.
        weight: DF, laid out input by input.
    """
    parts = 2 - x_BF.shape[1] % 2
    if parts == 2 and _is_for_triton(x_BF, weight, x_BF.shape[1] // 2, len(weight), _tile_of_halves(weight)):
        return halves_in_triton(x_BF, weight)
    return torch.bmm(x_BF.unflatten(1, (parts, -1)).transpose(0, 1), weight.unflatten(1, (parts, -1)).permute(1, 2, 0))


@halves.register_fake
def _(x_BF: Tensor, weight: Tensor) -> Tensor:
    return x_BF.new_empty((2 - x_BF.shape[1] % 2, x_BF.shape[0], weight.shape[0]))


def gated_in_triton(x_BD: Tensor, weight: Tensor) -> Tensor:
    """`gated` of at most `MOST_ROWS` and whole tiles."""
    (B, D), F = x_BD.shape, len(weight) // 2
    out_BF = x_BD.new_empty((B, F))
    _gated[(F // _GATED.columns,)](x_BD.contiguous(), weight.t(), out_BF, B, D, F, **_options(x_BD, _GATED))
    return out_BF


def halves_in_triton(x_BF: Tensor, weight: Tensor) -> Tensor:
    """`halves` of at most `MOST_ROWS` and whole tiles."""
    (B, F), D, tile = x_BF.shape, len(weight), _tile_of_halves(weight)
    out_2BD = x_BF.new_empty((2, B, D))
    _half[(D // tile.columns, 2)](x_BF.contiguous(), weight.t(), out_2BD, B, F, D, **_options(x_BF, tile))
    return out_2BD


def _is_for_triton(x: Tensor, weight: Tensor, inputs: int, outputs: int, tile: Tile) -> bool:
    """Whether a product has few rows, whole tiles, and a GPU on which Triton's kernel is the faster."""
    whole = inputs % tile.inputs == 0 and outputs % tile.columns == 0 and weight.t().is_contiguous()
    return whole and len(x) <= tile.most_rows and x.dtype == torch.bfloat16 and is_hopper(x.device)


def _tile_of_halves(weight: Tensor) -> Tile:
    return _WIDE if weight.shape[0] > weight.shape[1] else _HALVES


def _options(x: Tensor, tile: Tile) -> dict[str, object]:
    return {
        "ROWS": max(16, triton.next_power_of_2(len(x))),
        "COLUMNS": tile.columns,
        "INPUTS": tile.inputs,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    } | starting_early(x)
