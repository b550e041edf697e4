"""The Triton kernel of a decode step's attention: one new token for every row against a KV cache.

At a decode step the cache is read once, and each byte serves only a few multiplications, so a kernel is as good as the
share of the memory's bandwidth that it reaches. Three things make it so. All R = H / G query heads of a group go
through the matrix units together, so each K/V head is read once for all of them. Sequences that are left over, when
each of the device's multiprocessors has got as many as the others, are split among all of them, so that none idles
while a few go on; the last program of a sequence to get there combines the partial softmaxes (Flash-Decoding, Dao et
al. 2023, for the leftovers of a stream-K schedule, Osama et al. 2023). And the rotary embedding and the writing of the
new key and value happen here too, instead of in kernels of their own.

The position is read from device memory, so one CUDA graph serves all of them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
import torch
import triton
import triton.language as tl
from torch import Tensor

from nas.serving.launch import launch_dependents, starting_early, wait

_BLOCK = 64  # tokens that a program reads at a time
_FEWEST = 256  # tokens of a part: fewer, and it costs more than it brings
_MOST = 16  # parts, which one program combines
_LOG2_E = 1.4426950408889634  # softmax in powers of two


@triton.jit
def _sum(ptr, stride, there, N: tl.constexpr):
    """The terms of a value, added in fp32 and rounded once."""
    first = tl.load(ptr, mask=there, other=0.0)
    total = first.to(tl.float32)
    for n in tl.static_range(1, N):
        total += tl.load(ptr + n * stride, mask=there, other=0.0).to(tl.float32)
    return total.to(first.dtype)


@triton.jit
def _rotated(ptr, stride, cos, sin, d, there, N: tl.constexpr, D: tl.constexpr):
    """Heads (…, D) under the rotary embedding in half-split form, rounded as the reference rounds them."""
    x = _sum(ptr + d, stride, there, N)
    partner = _sum(ptr + tl.where(d < D // 2, d + D // 2, d - D // 2), stride, there, N)
    turned = x.to(tl.float32) * cos + tl.where(d < D // 2, -partner, partner).to(tl.float32) * sin
    return turned.to(x.dtype)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, semaphores_ptr, last_ptr, out_ptr, part_ptr, norm_ptr,
    scale, q_term, q_stride, k_term, k_stride, v_term, v_stride, row_stride, group_stride, whole, G, N: tl.constexpr,
    R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row's group: its R heads over all of the row's tokens, or over one part of ``SPLITS``."""
    part = tl.program_id(0) - whole
    split = part >= 0
    problem = tl.where(split, whole + part // SPLITS, tl.program_id(0))
    row, group = (problem // G).to(tl.int64), (problem % G).to(tl.int64)
    last = tl.load(last_ptr).to(tl.int32)
    share = tl.where(split, tl.cdiv(last + 1, SPLITS), last + 1)
    begin = tl.where(split, part % SPLITS, 0) * share
    end = tl.minimum(begin + share, last)  # the new token is not read back
    r, d, n = tl.arange(0, R_PAD), tl.arange(0, D_PAD)[None, :], tl.arange(0, BLOCK)
    real = (r[:, None] < R) & (d < D)
    cos = tl.load(cos_ptr + last * D + d, mask=d < D, other=0.0)
    sin = tl.load(sin_ptr + last * D + d, mask=d < D, other=0.0)
    wait(EARLY)
    q = _rotated(q_ptr + row * q_stride + (group * R + r[:, None]) * D, q_term, cos, sin, d, real, N, D)
    k_new = _rotated(k_ptr + row * k_stride + group * D, k_term, cos, sin, d, d < D, N, D)
    v_new = _sum(v_ptr + row * v_stride + group * D + d, v_term, d < D, N)
    at = row * row_stride + group * group_stride
    offsets = n[:, None] * D + d
    top = tl.full((R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((R_PAD,), tl.float32)
    mixed = tl.zeros((R_PAD, D_PAD), tl.float32)
    if (last >= begin) & (last < begin + share):  # the new token is here: it comes first, and goes to the cache
        tl.store(keys_ptr + at + last * D + d, k_new, mask=d < D)
        tl.store(values_ptr + at + last * D + d, v_new, mask=d < D)
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
        total += 1.0
        mixed += v_new.to(tl.float32)
    for token in range(begin, end, BLOCK):
        there = (token + n[:, None] < end) & (d < D)
        k = tl.load(keys_ptr + at + token * D + offsets, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(token + n[None, :] < end, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values_ptr + at + token * D + offsets, mask=there, other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    spread = r[:, None] * D + d
    complete = part < 0
    if SPLITS > 1:  # noqa: SIM102 -- decided when the kernel is compiled
        if split:
            seen = total > 0  # a part beyond the end has seen nothing
            mixed = mixed / tl.where(seen, total, 1.0)[:, None]
            norm = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
            tl.store(part_ptr + part * R * D + spread, mixed, mask=real)
            tl.store(norm_ptr + part * R + r, norm, mask=r < R)
            tl.debug_barrier()  # all of the program's threads have stored theirs
            complete = tl.atomic_add(semaphores_ptr + problem, 1) == SPLITS - 1
            if complete:
                top = tl.full((R_PAD,), float("-inf"), tl.float32)
                total = tl.zeros((R_PAD,), tl.float32)
                mixed = tl.zeros((R_PAD, D_PAD), tl.float32)
                for index in tl.static_range(SPLITS):
                    other = part - part % SPLITS + index
                    norm = tl.load(norm_ptr + other * R + r, mask=r < R, other=0.0, cache_modifier=".cg")
                    piece = tl.load(part_ptr + other * R * D + spread, mask=real, other=0.0, cache_modifier=".cg")
                    higher = tl.maximum(top, norm)  # the first is never empty
                    fade, weight = tl.exp2(top - higher), tl.exp2(norm - higher)
                    total = total * fade + weight
                    mixed = mixed * fade[:, None] + piece * weight[:, None]
                    top = higher
                tl.store(semaphores_ptr + problem, 0)
    launch_dependents(EARLY)
    if complete:
        out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + problem.to(tl.int64) * R * D + spread, out, mask=real)


def leftovers(problems: int, length: int, multiprocessors: int) -> tuple[int, int]:
    """How many sequences go to a program as a whole, and among how many programs each of the others is split.

    The others are what is left when each multiprocessor has got as many whole ones. They have so many parts that each
    multiprocessor gets one beside those, or, where there are none, up to one and a half: a program that is alone there
    does not keep the memory busy.

    Args:
        problems: Rows times groups.
        length: Tokens of the cache.
        multiprocessors: Of the device.
    """
    left = problems % multiprocessors
    places = multiprocessors if problems > left else 3 * multiprocessors // 2
    splits = min(places // left, length // _FEWEST, _MOST) if left else 1
    return (problems - left, splits) if splits > 1 else (problems, 1)


def stages(problems: int, multiprocessors: int) -> int:
    """Of the pipeline: blocks of so many less one are read ahead.

    With two, more programs find room on a multiprocessor. On an H100, with 32 heads of 128, that is the faster where
    there are more than two and at most four sequences a multiprocessor.
    """
    return 2 if 2 * multiprocessors < problems <= 4 * multiprocessors else 3


def _multiprocessors(device: torch.device) -> int:
    """Of a device; Triton's interpreter, in tests, counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@torch.library.custom_op("nas::decode_attention", mutates_args=("keys_BGCd", "values_BGCd", "semaphores"))
def decode_attention(
    q_NBHd: Tensor,
    k_NBGd: Tensor,
    v_NBGd: Tensor,
    cos_Cd: Tensor,
    sin_Cd: Tensor,
    keys_BGCd: Tensor,
    values_BGCd: Tensor,
    semaphores: Tensor,
    last: Tensor,
) -> Tensor:
    """Writes the new token's key and value into the cache, and attends to all up to it.

    Args:
        q_NBHd: Queries before rotation, as terms; of these and the next two, terms and rows may have any stride. More
            rows than the cache has are there to fill up a product: their output is undefined.
        k_NBGd: The new keys, before rotation.
        v_NBGd: The new values.
        cos_Cd: Cosines of every position, fp32.
        sin_Cd: Sines of every position.
        keys_BGCd: The cache's keys, rotated.
        values_BGCd: The cache's values.
        semaphores: At least B * G zeros of int32, with which programs tell each other how far they are; zeros again
            afterwards.
        last: Position of the new token, one integer on the device.
    """
    N, rows, H, d = q_NBHd.shape
    B, G, C = min(rows, len(keys_BGCd)), *keys_BGCd.shape[1:3]
    R = H // G
    multiprocessors = _multiprocessors(q_NBHd.device)
    whole, splits = leftovers(B * G, C, multiprocessors)
    parts = (B * G - whole) * splits
    out_BHd = torch.empty((rows, H, d), device=q_NBHd.device, dtype=q_NBHd.dtype)
    mixed = torch.empty((parts, R, d), device=q_NBHd.device, dtype=torch.float32)
    norms = torch.empty((parts, R), device=q_NBHd.device, dtype=torch.float32)
    _attend[(whole + parts,)](
        q_NBHd, k_NBGd, v_NBGd, cos_Cd, sin_Cd, keys_BGCd, values_BGCd, semaphores, last, out_BHd, mixed, norms,
        d**-0.5 * _LOG2_E, *q_NBHd.stride()[:2], *k_NBGd.stride()[:2], *v_NBGd.stride()[:2], *keys_BGCd.stride()[:2],
        whole, G, N=N, R=R, R_PAD=max(16, triton.next_power_of_2(R)), D=d, D_PAD=max(16, triton.next_power_of_2(d)),
        BLOCK=_BLOCK, SPLITS=splits, num_warps=4, num_stages=stages(B * G, multiprocessors),
        **starting_early(q_NBHd[0]),
    )  # fmt: skip
    return out_BHd


@decode_attention.register_fake
def _(q_NBHd: Tensor, *_: Tensor) -> Tensor:
    return q_NBHd.new_empty(q_NBHd.shape[1:])
