"""The Triton kernel of a decode step's attention: one new token for every row against a KV cache.

At a decode step the cache is read once, and each byte serves only a few multiplications, so a kernel is as good as the
share of the memory's bandwidth that it reaches. Three things make it so. All R = H / G query heads of a group go
through the matrix units together, so each K/V head is read once for all of them. The sequences of the tail wave, left
when each of the device's multiprocessors has got as many as the others, are split among all of them, so that none
idles while a few go on; the last program of a sequence to finish combines the partial softmaxes (Flash-Decoding, Dao et
al. 2023, for the tail wave of a stream-K schedule, Osama et al. 2023). And the rotary embedding and the writing of the
new key and value happen here too, instead of in kernels of their own.

The position is read from device memory, so one CUDA graph serves all of them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
import torch
import triton
import triton.language as tl
from torch import Tensor

from nas.serving.launch import launch_dependents, pdl_options, wait_for_dependencies

_BLOCK = 64  # tokens that a program reads at a time
_FEWEST = 256  # tokens of a split: fewer, and it costs more than it brings
_MOST = 16  # splits, which one program combines
_LOG2_E = 1.4426950408889634  # softmax in powers of two


@triton.jit
def _sum(ptr, stride, mask, N: tl.constexpr):
    """The split-K partials of a value, added in fp32 and rounded once."""
    first = tl.load(ptr, mask=mask, other=0.0)
    total = first.to(tl.float32)
    for n in tl.static_range(1, N):
        total += tl.load(ptr + n * stride, mask=mask, other=0.0).to(tl.float32)
    return total.to(first.dtype)


@triton.jit
def _rotated(ptr, stride, cos, sin, d, mask, N: tl.constexpr, D: tl.constexpr):
    """Heads (…, D) under the rotary embedding in half-split form, rounded as the reference rounds them."""
    x = _sum(ptr + d, stride, mask, N)
    partner = _sum(ptr + tl.where(d < D // 2, d + D // 2, d - D // 2), stride, mask, N)
    rotated = x.to(tl.float32) * cos + tl.where(d < D // 2, -partner, partner).to(tl.float32) * sin
    return rotated.to(x.dtype)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, semaphores_ptr, last_ptr, out_ptr, split_ptr, lse_ptr,
    scale, q_partial, q_stride, k_partial, k_stride, v_partial, v_stride, row_stride, group_stride, unsplit, G,
    N: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row's group: its R heads over all of the row's tokens, or over one split of ``SPLITS``."""
    split = tl.program_id(0) - unsplit
    is_split = split >= 0
    problem = tl.where(is_split, unsplit + split // SPLITS, tl.program_id(0))
    row, group = (problem // G).to(tl.int64), (problem % G).to(tl.int64)
    last = tl.load(last_ptr).to(tl.int32)
    share = tl.where(is_split, tl.cdiv(last + 1, SPLITS), last + 1)
    begin = tl.where(is_split, split % SPLITS, 0) * share
    end = tl.minimum(begin + share, last)  # the new token is not read back
    r, d, n = tl.arange(0, R_PAD), tl.arange(0, D_PAD)[None, :], tl.arange(0, BLOCK)
    real = (r[:, None] < R) & (d < D)
    cos = tl.load(cos_ptr + last * D + d, mask=d < D, other=0.0)
    sin = tl.load(sin_ptr + last * D + d, mask=d < D, other=0.0)
    wait_for_dependencies(PDL)
    q = _rotated(q_ptr + row * q_stride + (group * R + r[:, None]) * D, q_partial, cos, sin, d, real, N, D)
    k_new = _rotated(k_ptr + row * k_stride + group * D, k_partial, cos, sin, d, d < D, N, D)
    v_new = _sum(v_ptr + row * v_stride + group * D + d, v_partial, d < D, N)
    base = row * row_stride + group * group_stride
    offsets = n[:, None] * D + d
    highest = tl.full((R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((R_PAD,), tl.float32)
    acc = tl.zeros((R_PAD, D_PAD), tl.float32)
    if (last >= begin) & (last < begin + share):  # the new token is here: it comes first, and goes to the cache
        tl.store(keys_ptr + base + last * D + d, k_new, mask=d < D)
        tl.store(values_ptr + base + last * D + d, v_new, mask=d < D)
        highest = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
        total += 1.0
        acc += v_new.to(tl.float32)
    for token in range(begin, end, BLOCK):
        mask = (token + n[:, None] < end) & (d < D)
        k = tl.load(keys_ptr + base + token * D + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(token + n[None, :] < end, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(highest - higher)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(values_ptr + base + token * D + offsets, mask=mask, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    spread = r[:, None] * D + d
    complete = split < 0
    if SPLITS > 1:  # noqa: SIM102 -- decided when the kernel is compiled
        if is_split:
            seen = total > 0  # a split beyond the end has seen nothing
            acc = acc / tl.where(seen, total, 1.0)[:, None]
            lse = tl.where(seen, highest + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
            tl.store(split_ptr + split * R * D + spread, acc, mask=real)
            tl.store(lse_ptr + split * R + r, lse, mask=r < R)
            tl.debug_barrier()  # all of the program's threads have stored theirs
            complete = tl.atomic_add(semaphores_ptr + problem, 1) == SPLITS - 1
            if complete:
                highest = tl.full((R_PAD,), float("-inf"), tl.float32)
                total = tl.zeros((R_PAD,), tl.float32)
                acc = tl.zeros((R_PAD, D_PAD), tl.float32)
                for index in tl.static_range(SPLITS):
                    other = split - split % SPLITS + index
                    lse = tl.load(lse_ptr + other * R + r, mask=r < R, other=0.0, cache_modifier=".cg")
                    out = tl.load(split_ptr + other * R * D + spread, mask=real, other=0.0, cache_modifier=".cg")
                    higher = tl.maximum(highest, lse)  # the first is never empty
                    rescale, weight = tl.exp2(highest - higher), tl.exp2(lse - higher)
                    total = total * rescale + weight
                    acc = acc * rescale[:, None] + out * weight[:, None]
                    highest = higher
                tl.store(semaphores_ptr + problem, 0)
    launch_dependents(PDL)
    if complete:
        result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + problem.to(tl.int64) * R * D + spread, result, mask=real)


def split_tail_wave(problems: int, length: int, multiprocessors: int) -> tuple[int, int]:
    """How many sequences a program each takes alone, and among how many programs each of the others is split.

    The others are the tail wave. They have so many splits that each multiprocessor gets one beside the full waves, or,
    where there are none, up to one and a half: a program that is alone there does not keep the memory busy. Problems
    are rows times groups, and the length is the cache's.
    """
    tail = problems % multiprocessors
    places = multiprocessors if problems > tail else 3 * multiprocessors // 2
    splits = min(places // tail, length // _FEWEST, _MOST) if tail else 1
    return (problems - tail, splits) if splits > 1 else (problems, 1)


def pipeline_stages(problems: int, multiprocessors: int) -> int:
    """Stages of the kernel's pipeline: one block of tokens fewer is read ahead.

    With two, more programs find room on a multiprocessor. On an H100, with 32 heads of 128, that is faster where there
    are more than two and at most four sequences per multiprocessor.
    """
    return 2 if 2 * multiprocessors < problems <= 4 * multiprocessors else 3


@torch.library.custom_op("nas::decode_attention", mutates_args=("keys_BGCd", "values_BGCd", "semaphores"))
def decode_attention(
    q_NBHd: Tensor,
    k_NBGd: Tensor,
    v_NBGd: Tensor,
    cos_Cd: Tensor,
    sin_Cd: Tensor,
    keys_BGCd: Tensor,
    values_BGCd: Tensor,
    semaphores: Tensor,  # at least B * G zeros of int32, which count the finished splits; zeros again afterwards
    last: Tensor,  # position of the new token, one integer on the device
) -> Tensor:
    """Writes the new token's key and value into the cache, and attends to all up to it.

    Queries, keys and values come before rotation and as split-K partials; partials and rows may have any stride. Rows
    beyond the cache's pad the batch: their output is undefined. The cache's keys are rotated.
    """
    N, rows, H, d = q_NBHd.shape
    B, G, C = min(rows, len(keys_BGCd)), *keys_BGCd.shape[1:3]
    R = H // G
    device = q_NBHd.device  # a CPU is that of Triton's interpreter, in tests
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    unsplit, splits = split_tail_wave(B * G, C, multiprocessors)
    programs = (B * G - unsplit) * splits
    out_BHd = torch.empty((rows, H, d), device=device, dtype=q_NBHd.dtype)
    split_outs = torch.empty((programs, R, d), device=device, dtype=torch.float32)
    log_sums = torch.empty((programs, R), device=device, dtype=torch.float32)
    _attend[(unsplit + programs,)](
        q_NBHd, k_NBGd, v_NBGd, cos_Cd, sin_Cd, keys_BGCd, values_BGCd, semaphores, last, out_BHd, split_outs, log_sums,
        d**-0.5 * _LOG2_E, *q_NBHd.stride()[:2], *k_NBGd.stride()[:2], *v_NBGd.stride()[:2], *keys_BGCd.stride()[:2],
        unsplit, G, N=N, R=R, R_PAD=max(16, triton.next_power_of_2(R)), D=d, D_PAD=max(16, triton.next_power_of_2(d)),
        BLOCK=_BLOCK, SPLITS=splits, num_warps=4, num_stages=pipeline_stages(B * G, multiprocessors),
        **pdl_options(q_NBHd[0]),
    )  # fmt: skip
    return out_BHd


@decode_attention.register_fake
def _(q_NBHd: Tensor, *_: Tensor) -> Tensor:
    return q_NBHd.new_empty(q_NBHd.shape[1:])
