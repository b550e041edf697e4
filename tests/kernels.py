"""Triton's kernels against PyTorch's operations, then a whole decode step against the plain decoder.

Runs on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter; test_serving.py starts it in a process of its own.

    python tests/kernels.py cpu|cuda
"""

import dataclasses
import itertools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.model import Decoder
from nas.model.decoder import RMSNorm, rotate
from nas.serving import KVCache, ServingModel, attention
from nas.serving.elementwise import swiglu
from nas.serving.gemm import gate_up_in_triton, gate_up_swiglu, split_k, split_k_in_triton
from nas.serving.layers import residual_norm
from nas.shape import ModelShape

SHAPE, VECTOR = ModelShape(3, 48, 12, 8, 64, 97, 24), (4, 1, 2)
ATTENTION = [  # B, H, G, d, cache length, tokens in it, sequences that are not split, splits of each other one
    (2, 8, 2, 16, 200, 150, 4, 1),
    (2, 8, 2, 16, 200, 150, 2, 3),
    (2, 8, 2, 16, 200, 150, 0, 7),
    (1, 8, 1, 24, 64, 1, 0, 2),
    (3, 32, 1, 32, 130, 129, 2, 5),
    (2, 4, 4, 16, 50, 33, 5, 2),
]


def draw(*size: int) -> Tensor:
    return torch.randn(size)


def check_attention(device: str, B: int, H: int, G: int, d: int, C: int, tokens: int, *, every_form: bool) -> None:
    q, k, v = draw(B, H + 2 * G, d).split([H, G, G], dim=1)
    keys, values, cos, sin = draw(B, G, C, d), draw(B, G, C, d), draw(C, d), draw(C, d)
    rope = cos[tokens - 1 : tokens], sin[tokens - 1 : tokens]
    new_keys, new_values = keys.clone(), values.clone()
    new_keys[:, :, tokens - 1], new_values[:, :, tokens - 1] = rotate(k[:, :, None], rope)[:, :, 0], v
    packed = rotate(q[:, :, None], rope).view(B, G, H // G, d)
    expected = F.scaled_dot_product_attention(packed, new_keys[:, :, :tokens], new_values[:, :, :tokens])

    partials = draw(2, B, H + 2 * G, d)
    partials[1] = torch.cat((q, k, v), 1) - partials[0]
    as_partials = partials.to(device).split([H, G, G], dim=2)
    summed = partials.sum(0, keepdim=True).to(device).split([H, G, G], dim=2)
    normed = [part.contiguous() for part in summed[:2]] + [summed[2]]
    semaphores = torch.zeros(B * G, dtype=torch.int32, device=device)
    table, last = (cos.to(device), sin.to(device)), torch.tensor(tokens - 1).to(device)
    forms = (as_partials, summed, normed)  # as they come, as one partial, and as they are after q/k norms
    for new in forms if every_form else forms[:1]:
        cache = keys.to(device, copy=True), values.to(device, copy=True)
        out = attention.decode_attention(*new, *table, *cache, semaphores, last)
        torch.testing.assert_close(out.cpu(), expected.reshape(B, H, d), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cache[0].cpu(), new_keys)
        torch.testing.assert_close(cache[1].cpu(), new_values)
        assert not semaphores.any()
    one_row = (part[:, :1] for part in as_partials)  # the cache has more
    few = attention.decode_attention(*one_row, *table, *cache, semaphores, last)
    torch.testing.assert_close(few.cpu(), expected.reshape(B, H, d)[:1], atol=1e-5, rtol=1e-5)


def check_elementwise(device: str) -> None:
    last, norm = torch.tensor(0, device=device), RMSNorm(100, 1e-5).to(device)
    torch.nn.init.normal_(norm.weight)
    for partials in (0, 1, 2):
        x, added = torch.randn(5, 1, 100, device=device), torch.randn(partials, 5, 1, 100, device=device)
        total = x + added.sum(0)
        torch.testing.assert_close(residual_norm(x, added, norm, last), (total, norm(total)))
    gate_up = torch.randn(3, 2 * 1500, device=device)
    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(swiglu(gate_up), F.silu(gate) * up)


def check_gemms(device: str) -> None:
    in_bf16 = [(torch.bfloat16, 128), (torch.bfloat16, 1)] if device == "cuda" else []  # the interpreter knows none
    trials = [(torch.float32, 5), (torch.float32, 33), *in_bf16]
    for (dtype, rows), (inputs, outputs) in itertools.product(trials, [(256, 512), (512, 256)]):
        x, weight = torch.randn(rows, inputs, device=device), torch.randn(inputs, outputs, device=device) / 16
        x, weight = x.to(dtype), weight.to(dtype).t()
        close = 1e-5 if dtype == torch.float32 else 0.01
        gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
        for out in (gate_up_in_triton(x, weight), gate_up_swiglu(x, weight, None)):
            torch.testing.assert_close(out.double(), F.silu(gate) * up, rtol=close, atol=close)
        for partials in (split_k_in_triton(x, weight), split_k(x, weight)):
            for partial, half in zip(partials.double(), torch.arange(inputs).chunk(2), strict=True):
                expected = x[:, half].double() @ weight[:, half].double().t()
                torch.testing.assert_close(partial, expected, rtol=close, atol=close)


def check_step(device: str, rows: int = 3, padded: int = 5, start: int = 6, length: int = 8) -> None:
    for features in (False, True):
        shape = dataclasses.replace(SHAPE, qk_norm=features, qkv_bias=features, mlp_bias=features)
        decoder = Decoder(shape, VECTOR).requires_grad_(False)
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
        tokens = torch.randint(shape.vocab_size, (padded, length))
        expected, tokens = decoder(tokens[:rows]), tokens.to(device)
        model, cache = ServingModel.of(decoder, device), KVCache(shape, VECTOR, rows, length, device)
        model(tokens[:rows, :start], cache.layers)
        for position in range(start, length):
            with torch.inference_mode():
                step = model(tokens[:, position : position + 1], cache.layers, torch.tensor(position, device=device))
            torch.testing.assert_close(step[:rows].cpu(), expected[:, position], atol=1e-4, rtol=1e-4)


def main(device: str) -> None:
    torch.manual_seed(0)
    for B, H, G, d, C, tokens, unsplit, splits in ATTENTION:
        attention.split_tail_wave = lambda problems, *_, at=(unsplit, splits): (min(at[0], problems), at[1])
        check_attention(device, B, H, G, d, C, tokens, every_form=splits == 3)
    check_elementwise(device)
    check_gemms(device)
    check_step(device)


if __name__ == "__main__":
    main(sys.argv[1])
