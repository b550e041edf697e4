"""The GEMMs of a decode step's layers, as far as the kernel that comes next takes their results in parts.

All but the MLP's first are split-K: two partials, each the sum over half of the inputs. One sum of few rows and many
inputs would leave multiprocessors idle, and the next kernel adds the partials for nothing. Gate, up and SwiGLU are one
kernel, as a program computes the same columns of both.

On GPUs of the kind that they were tuned for, few rows are for Triton's kernels, which use programmatic dependent
launch. More rows than a program's tile are left to cuBLAS, whose programs share what they read.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
from typing import NamedTuple

import torch
import torch.nn.functional as F_
import triton
import triton.language as tl
from torch import Tensor

from nas.serving.elementwise import swiglu
from nas.serving.launch import MOST_ROWS, is_hopper, launch_dependents, pdl_options, wait_for_dependencies


class Tile(NamedTuple):
    """What a program of a GEMM computes at a time; these sizes were the fastest on an H100."""

    columns: int  # outputs; of gate, and as many of up
    inputs: int  # that are summed at a time
    warps: int
    stages: int  # of the pipeline: one block of inputs fewer is read ahead
    most_rows: int = MOST_ROWS  # with more, cuBLAS was faster


_GATE_UP = Tile(columns=128, inputs=32, warps=8, stages=5)
_SPLIT_K = Tile(columns=64, inputs=64, warps=4, stages=6)
_WIDE = Tile(columns=128, inputs=64, warps=4, stages=5, most_rows=64)  # split-K with more outputs than inputs


@triton.jit
def _gate_up_kernel(
    x_ptr, weight_ptr, out_ptr, rows, D, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A block of columns, all rows."""
    b, d, f = tl.arange(0, ROWS), tl.arange(0, INPUTS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += b[:, None] * D + d
    weight_ptr += d[:, None].to(tl.int64) * 2 * F + f
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_dependencies(PDL)
    launch_dependents(PDL)
    for _ in range(0, D, INPUTS):
        x = tl.load(x_ptr, mask=b[:, None] < rows, other=0.0)
        gate = tl.dot(x, tl.load(weight_ptr), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(weight_ptr + F), up, input_precision="ieee")
        x_ptr += INPUTS
        weight_ptr += INPUTS * 2 * F
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + b[:, None] * F + f, out, mask=b[:, None] < rows)


@triton.jit
def _split_k_kernel(
    x_ptr, weight_ptr, out_ptr, rows, F, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A block of columns of one partial, all rows."""
    b, d = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    f = tl.program_id(1) * (F // 2) + tl.arange(0, INPUTS)
    x_ptr += b[:, None] * F + f
    weight_ptr += f[:, None].to(tl.int64) * D + d
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_dependencies(PDL)
    launch_dependents(PDL)
    for _ in range(0, F // 2, INPUTS):
        x = tl.load(x_ptr, mask=b[:, None] < rows, other=0.0)
        total = tl.dot(x, tl.load(weight_ptr), total, input_precision="ieee")
        x_ptr += INPUTS
        weight_ptr += INPUTS * D
    out_ptr += tl.program_id(1).to(tl.int64) * rows * D + b[:, None] * D + d
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=b[:, None] < rows)


@torch.library.custom_op("nas::gate_up_swiglu", mutates_args=())
def gate_up_swiglu(x_BD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the first half of a linear layer's outputs times the second; contiguous, BF.

    The weight (2F, D) is laid out input by input.
    """
    if bias is None and _is_for_triton(x_BD, weight, x_BD.shape[1], len(weight) // 2, _GATE_UP):
        return gate_up_in_triton(x_BD, weight)
    return swiglu(F_.linear(x_BD, weight, bias))


@gate_up_swiglu.register_fake
def _(x_BD: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
    return x_BD.new_empty((x_BD.shape[0], weight.shape[0] // 2))


@torch.library.custom_op("nas::split_k", mutates_args=())
def split_k(x_BF: Tensor, weight: Tensor) -> Tensor:
    """A GEMM as two partials (2BD), each the sum over half of F; an odd F gives one.

    The weight DF is laid out input by input.
    """
    N = 2 - x_BF.shape[1] % 2
    if N == 2 and _is_for_triton(x_BF, weight, x_BF.shape[1] // 2, len(weight), _split_k_tile(weight)):
        return split_k_in_triton(x_BF, weight)
    return torch.bmm(x_BF.unflatten(1, (N, -1)).transpose(0, 1), weight.unflatten(1, (N, -1)).permute(1, 2, 0))


@split_k.register_fake
def _(x_BF: Tensor, weight: Tensor) -> Tensor:
    return x_BF.new_empty((2 - x_BF.shape[1] % 2, x_BF.shape[0], weight.shape[0]))


def gate_up_in_triton(x_BD: Tensor, weight: Tensor) -> Tensor:
    """`gate_up_swiglu` of at most `MOST_ROWS` and whole tiles."""
    (B, D), F = x_BD.shape, len(weight) // 2
    out_BF = x_BD.new_empty((B, F))
    grid = (F // _GATE_UP.columns,)
    _gate_up_kernel[grid](x_BD.contiguous(), weight.t(), out_BF, B, D, F, **_options(x_BD, _GATE_UP))
    return out_BF


def split_k_in_triton(x_BF: Tensor, weight: Tensor) -> Tensor:
    """`split_k` of at most `MOST_ROWS` and whole tiles."""
    (B, F), D, tile = x_BF.shape, len(weight), _split_k_tile(weight)
    out_2BD = x_BF.new_empty((2, B, D))
    _split_k_kernel[(D // tile.columns, 2)](x_BF.contiguous(), weight.t(), out_2BD, B, F, D, **_options(x_BF, tile))
    return out_2BD


def _is_for_triton(x: Tensor, weight: Tensor, inputs: int, outputs: int, tile: Tile) -> bool:
    """Whether a GEMM has few rows, whole tiles, and a GPU on which Triton's kernel is faster."""
    whole_tiles = inputs % tile.inputs == 0 and outputs % tile.columns == 0 and weight.t().is_contiguous()
    return whole_tiles and len(x) <= tile.most_rows and x.dtype == torch.bfloat16 and is_hopper(x.device)


def _split_k_tile(weight: Tensor) -> Tile:
    return _WIDE if weight.shape[0] > weight.shape[1] else _SPLIT_K


def _options(x: Tensor, tile: Tile) -> dict[str, object]:
    sizes = {"ROWS": max(16, triton.next_power_of_2(len(x))), "COLUMNS": tile.columns, "INPUTS": tile.inputs}
    return sizes | {"num_warps": tile.warps, "num_stages": tile.stages} | pdl_options(x)
