"""The Triton kernel of a decode step's attention: one new token for every row against a KV cache.

At a decode step the cache is read once, and each byte serves only a few multiplications, so a kernel is as good as the
share of the memory's bandwidth that it reaches. Three things make it so. All R = H / G query heads of a group go
through the matrix units together, so each K/V head is read once for all of them. Where rows times groups are too few
to fill the device, a sequence is split among several programs, whose partial softmaxes a second kernel combines
(as in Flash-Decoding, Dao et al. 2023). And the rotary embedding and the writing of the new key and value happen here
too, instead of in kernels of their own.

The position is read from device memory, so one CUDA graph serves all of them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64  # tokens that a program reads at a time
_FEWEST = 256  # tokens of a split: fewer, and combining costs more than it brings
_MOST = 64  # splits
_STAGES = 3  # of the pipeline: blocks of so many less one are read ahead
_RESERVED = 1024  # bytes of shared memory that CUDA takes for each program
_SATURATING = 0.85  # programs for each multiprocessor; read, like the next, off an H100's times
_COMBINING = 160  # tokens
_LOG2_E = 1.4426950408889634  # softmax in powers of two


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, d, there, D: tl.constexpr):
    """Heads (…, D) under the rotary embedding in half-split form, rounded as the reference rounds them."""
    x = tl.load(x_ptr + d, mask=there, other=0.0)
    partner = tl.load(x_ptr + tl.where(d < D // 2, d + D // 2, d - D // 2), mask=there, other=0.0)
    cos, sin = tl.load(cos_ptr + d, mask=d < D, other=0.0), tl.load(sin_ptr + d, mask=d < D, other=0.0)
    turned = x.to(tl.float32) * cos + tl.where(d < D // 2, -partner, partner).to(tl.float32) * sin
    return turned.to(x.dtype)


@triton.jit
def _attend_split(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, last_ptr, out_ptr, norm_ptr, scale,
    q_stride, k_stride, v_stride, row_stride, group_stride, G, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one row's group: its R heads over its share of the tokens."""
    problem, split = tl.program_id(0), tl.program_id(1)
    row, group = (problem // G).to(tl.int64), (problem % G).to(tl.int64)
    last = tl.load(last_ptr).to(tl.int32)
    share = tl.cdiv(tl.cdiv(last + 1, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, last)  # the new token is not read back
    r, d, n = tl.arange(0, R_PAD)[:, None], tl.arange(0, D_PAD)[None, :], tl.arange(0, BLOCK)
    cos_ptr += last * D
    sin_ptr += last * D
    real = (r < R) & (d < D)
    q = _rotated(q_ptr + row * q_stride + (group * R + r) * D, cos_ptr, sin_ptr, d, real, D)
    at = row * row_stride + group * group_stride
    offsets = n[:, None] * D + d
    top = tl.full((R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((R_PAD,), tl.float32)
    mixed = tl.zeros((R_PAD, D_PAD), tl.float32)
    if (last >= begin) & (last < begin + share):  # this split has the new token: it comes first, and goes to the cache
        k = _rotated(k_ptr + row * k_stride + group * D, cos_ptr, sin_ptr, d, d < D, D)
        v = tl.load(v_ptr + row * v_stride + group * D + d, mask=d < D, other=0.0)
        tl.store(keys_ptr + at + last * D + d, k, mask=d < D)
        tl.store(values_ptr + at + last * D + d, v, mask=d < D)
        top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        total += 1.0
        mixed += v.to(tl.float32)
    for token in range(begin, end, BLOCK):
        there = (token + n[:, None] < end) & (d < D)
        k = tl.load(keys_ptr + at + token * D + offsets, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(token + n[None, :] < end, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values_ptr + at + token * D + offsets, mask=there, other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # a split beyond the end has seen nothing
    spot = (problem * SPLITS + split) * R + r
    tl.store(out_ptr + spot.to(tl.int64) * D + d, mixed.to(out_ptr.dtype.element_ty), mask=real)
    if SPLITS > 1:
        heads = tl.arange(0, R_PAD)
        norms = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(norm_ptr + (problem * SPLITS + split) * R + heads, norms, mask=heads < R)


@triton.jit
def _combine(
    part_ptr, norm_ptr, out_ptr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """One head's splits, each weighted by what its softmax had below the line."""
    problem, r = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS_PAD), tl.arange(0, D_PAD)
    spot = (problem * SPLITS + s) * R + r
    norms = tl.load(norm_ptr + spot, mask=s < SPLITS, other=float("-inf"))
    weights = tl.exp2(norms - tl.max(norms, 0))
    there = (s[:, None] < SPLITS) & (d[None, :] < D)
    parts = tl.load(part_ptr + spot[:, None].to(tl.int64) * D + d[None, :], mask=there, other=0.0)
    mixed = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + (problem * R + r).to(tl.int64) * D + d, mixed.to(out_ptr.dtype.element_ty), mask=d < D)


@dataclass(frozen=True)
class Room:
    """Where a device runs the programs of the kernel.

    Attributes:
        resident: How many programs at the same time.
        saturating: How many programs take all of the memory's bandwidth.
    """

    resident: int
    saturating: float


@functools.cache
def _room(device: torch.device, rows: int, width: int, itemsize: int) -> Room:
    """For programs of so many padded heads of so padded a width."""
    if device.type != "cuda":  # Triton's interpreter, in tests
        return Room(1, 1.0)
    about = torch.cuda.get_device_properties(device)
    blocks = 2 * (_STAGES - 1) * _BLOCK * width  # keys and values on their way
    shared = itemsize * (blocks + rows * width + rows * _BLOCK) + _RESERVED  # and queries, and weights
    resident = max(1, about.shared_memory_per_multiprocessor // shared)
    return Room(resident * about.multi_processor_count, _SATURATING * about.multi_processor_count)


def split_count(problems: int, heads: int, length: int, room: Room) -> int:
    """Among how many programs each sequence is split.

    Few programs do not saturate the memory, and no more do the last few of many, for which there was no room at first.
    Splitting shortens that, but its parts are to be combined. Time is counted in tokens that one program alone reads.

    Args:
        problems: Rows times groups.
        heads: Of a group.
        length: Tokens of the cache.
        room: Where they run.
    """

    def taken(splits: int) -> float:
        full_rounds, left = divmod(problems * splits, room.resident)
        last_round = max(1.0, left / room.saturating) if left else 0.0
        rounds = full_rounds * max(1.0, room.resident / room.saturating) + last_round
        if splits == 1:
            return rounds * length
        return rounds * (length / splits + 2 * heads) + _COMBINING  # a part of fp32 is written and read again

    return min(range(1, min(triton.cdiv(length, _FEWEST), _MOST) + 1), key=taken)


@torch.library.custom_op("nas::decode_attention", mutates_args=("keys_BGCd", "values_BGCd"))
def decode_attention(
    q_BHd: Tensor,
    k_BGd: Tensor,
    v_BGd: Tensor,
    cos_Cd: Tensor,
    sin_Cd: Tensor,
    keys_BGCd: Tensor,
    values_BGCd: Tensor,
    last: Tensor,
) -> Tensor:
    """Writes the new token's key and value into the cache, and attends to all up to it.

    Args:
        q_BHd: Queries before rotation; of these and the next two, rows may have any stride. More rows than the cache
            has are there to fill up a product: their output is undefined.
        k_BGd: The new keys, before rotation.
        v_BGd: The new values.
        cos_Cd: Cosines of every position, fp32.
        sin_Cd: Sines of every position.
        keys_BGCd: The cache's keys, rotated.
        values_BGCd: The cache's values.
        last: Position of the new token, one integer on the device.
    """
    H, d = q_BHd.shape[1:]
    B, G = min(len(q_BHd), len(keys_BGCd)), keys_BGCd.shape[1]
    R, pad = H // G, max(16, triton.next_power_of_2(d))
    R_pad = max(16, triton.next_power_of_2(R))
    splits = split_count(B * G, R, keys_BGCd.shape[2], _room(q_BHd.device, R_pad, pad, q_BHd.element_size()))
    out_BHd = torch.empty(q_BHd.shape, device=q_BHd.device, dtype=q_BHd.dtype)
    parts, norms = out_BHd, out_BHd
    if splits > 1:
        parts = torch.empty((B * G, splits, R, d), device=q_BHd.device, dtype=torch.float32)
        norms = torch.empty((B * G, splits, R), device=q_BHd.device, dtype=torch.float32)
    _attend_split[(B * G, splits)](
        q_BHd, k_BGd, v_BGd, cos_Cd, sin_Cd, keys_BGCd, values_BGCd, last, parts, norms, d**-0.5 * _LOG2_E,
        q_BHd.stride(0), k_BGd.stride(0), v_BGd.stride(0), keys_BGCd.stride(0), keys_BGCd.stride(1),
        G, R=R, R_PAD=R_pad, D=d, D_PAD=pad, BLOCK=_BLOCK, SPLITS=splits,
        PRECISION="ieee" if q_BHd.dtype == torch.float32 else "tf32", num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    if splits > 1:
        _combine[(B * G, R)](
            parts, norms, out_BHd, R=R, D=d, D_PAD=pad, SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits),
            num_warps=1,
        )  # fmt: skip
    return out_BHd


@decode_attention.register_fake
def _(q_BHd: Tensor, *_: Tensor) -> Tensor:
    return torch.empty(q_BHd.shape, device=q_BHd.device, dtype=q_BHd.dtype)
