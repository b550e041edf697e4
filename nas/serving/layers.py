"""The decoder in the form that serves it: fewer, larger matrices, and a step that works on a static KV cache.

Queries, keys and values come from one GEMM, gate and up from another. A layer takes and returns the residual stream as
x and the split-K partials that are still to be added to it: so additions and the norm that follows are neighbours,
which one kernel does. Weights are those of a `Decoder`, rearranged.

A decode step's position is an integer or in device memory. The first is served by PyTorch's own operations; the second,
which a CUDA graph can replay for any position, by Triton's kernels between the GEMMs.

Shape suffixes as in `nas.model.decoder`; N is the number of split-K partials.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.model.decoder import Decoder, Layer, RMSNorm, Rope, rope_table, rotate
from nas.serving.cache import LayerCache
from nas.shape import LayerSpec, ModelShape

Position = int | Tensor | None  # of a decode step's token; None for a prompt from position 0 on
_FUSED = {  # each serving matrix, and the plain layer's that it is put together from
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


class InputMajorLinear(nn.Linear):
    """A linear layer whose weight is laid out input by input.

    A GEMM with few rows takes as long as its weight takes to be read. All of its programs go through the inputs side by
    side; in this layout what they read at a time lies side by side, too, and memory is read in long sweeps.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.weight.data = self.weight.data.t().contiguous().t()


class ServingLayer(nn.Module):
    """One decoder layer."""

    qkv_proj: InputMajorLinear
    o_proj: InputMajorLinear
    gate_up_proj: InputMajorLinear
    down_proj: InputMajorLinear
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    q_norm: RMSNorm  # these two where the spec has them
    k_norm: RMSNorm

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = spec.shape.num_attention_heads, spec.kv_groups, spec.shape.head_dim
        self.qk_norm = spec.shape.qk_norm
        for name, plain in _FUSED.items():
            linears = [spec.linears[part] for part in plain]
            outputs = sum(linear.outputs for linear in linears)
            self.add_module(name, InputMajorLinear(linears[0].inputs, outputs, linears[0].bias))
        for name, width in spec.norms.items():
            self.add_module(name, RMSNorm(width, spec.shape.rms_norm_eps))

    def share(self, twin: "ServingLayer") -> None:
        """Uses the weights of a layer with other groups, all but those of queries, keys and values."""
        self.o_proj, self.gate_up_proj, self.down_proj = twin.o_proj, twin.gate_up_proj, twin.down_proj
        self.input_layernorm, self.post_attention_layernorm = twin.input_layernorm, twin.post_attention_layernorm

    @torch.no_grad()
    def load(self, layer: Layer) -> None:
        """Takes over the weights of a plain layer."""
        plain = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        for name, module in self.named_children():
            for kind, parameter in module.named_parameters():
                parts = [plain[part].get_parameter(kind) for part in _FUSED.get(name, (name,))]
                parameter.copy_(torch.cat(parts))

    def forward(
        self, x_BTD: Tensor, partials_NBTD: Tensor, rope: Rope, cache: LayerCache, last: Position = None
    ) -> tuple[Tensor, Tensor]:
        """A prompt from position 0 on or, at position ``last``, one more token for every row.

        The residual stream comes and goes as x and the partials that are still to be added to it; ``rope`` holds all
        positions.
        """
        x_BTD, normed_BTD = residual_norm(x_BTD, partials_NBTD, self.input_layernorm, last)
        if isinstance(last, Tensor):
            return self._decode(x_BTD, normed_BTD, rope, cache, last)
        out_BTHd = self._attend(*self._heads(self.qkv_proj(normed_BTD)), rope, cache, last)
        partials_NBTD = self.o_proj(out_BTHd.flatten(2)).unsqueeze(0)
        x_BTD, normed_BTD = residual_norm(x_BTD, partials_NBTD, self.post_attention_layernorm, last)
        gate, up = self.gate_up_proj(normed_BTD).chunk(2, dim=-1)
        return x_BTD, self.down_proj(F.silu(gate) * up).unsqueeze(0)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values out of their joint projection (…, W), each (…, H or G, d)."""
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([self.heads, self.groups, self.groups], dim=-2)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def _decode(
        self, x_BTD: Tensor, normed_BTD: Tensor, rope: Rope, cache: LayerCache, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token whose position is in device memory, by kernels that take sums as split-K partials."""
        from nas.serving.attention import decode_attention  # Triton comes with PyTorch's builds for GPUs only
        from nas.serving.gemm import gate_up_swiglu

        qkv_NBW = split_k_linear(normed_BTD[:, 0], self.qkv_proj)
        q, k, v = self._heads(qkv_NBW.sum(0, keepdim=True) if self.qk_norm else qkv_NBW)
        out_BHd = decode_attention(q, k, v, *rope, cache.keys, cache.values, cache.semaphores, last)
        partials_NBTD = split_k_linear(out_BHd.flatten(1), self.o_proj).unsqueeze(2)
        x_BTD, normed_BTD = residual_norm(x_BTD, partials_NBTD, self.post_attention_layernorm, last)
        hidden_BF = gate_up_swiglu(normed_BTD[:, 0], self.gate_up_proj.weight, self.gate_up_proj.bias)
        return x_BTD, split_k_linear(hidden_BF, self.down_proj).unsqueeze(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, last: int | None) -> Tensor:
        begin, end = (0, q.shape[1]) if last is None else (last, last + 1)
        here = rope[0][begin:end], rope[1][begin:end]
        q, k, v = rotate(q.transpose(1, 2), here), rotate(k.transpose(1, 2), here), v.transpose(1, 2)
        cache.keys[:, :, begin:end], cache.values[:, :, begin:end] = k, v
        if last is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        # The R = H / G query heads of a group become the rows of one attention problem: each K/V head is read once.
        # There is no mask: the new token may see everything in the cache.
        packed_BGRd, keys, values = q.view(len(q), self.groups, -1, self.head_dim), cache.keys, cache.values
        attended_BGRd = F.scaled_dot_product_attention(packed_BGRd, keys[:, :, :end], values[:, :, :end])
        return attended_BGRd.flatten(1, 2).unsqueeze(1)


def residual_norm(x_BTD: Tensor, partials_NBTD: Tensor, norm: RMSNorm, last: Position) -> tuple[Tensor, Tensor]:
    """The residual stream with its partials added, and that under a norm."""
    if isinstance(last, Tensor):
        from nas.serving.elementwise import add_norm

        x_BD, normed_BD = add_norm(x_BTD[:, 0], partials_NBTD[:, :, 0], norm.weight, norm.eps)
        return x_BD.unsqueeze(1), normed_BD.unsqueeze(1)
    if len(partials_NBTD):  # one: only the kernels of a decode step leave more
        x_BTD = x_BTD + partials_NBTD[0]
    return x_BTD, norm(x_BTD)


def split_k_linear(x_BF: Tensor, linear: nn.Linear) -> Tensor:
    """A linear layer's output as partials (NBD), see `split_k`."""
    from nas.serving.gemm import split_k

    partials_NBD: Tensor = split_k(x_BF, linear.weight)
    return partials_NBD if linear.bias is None else partials_NBD + linear.bias / len(partials_NBD)


class ServingModel(nn.Module):
    """A model with the group vector ``vector`` in the form that serves it.

    Its weights are of one dtype and undefined at first; the rotary table is fp32.
    """

    layers: Sequence[ServingLayer]
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        shape: ModelShape,
        vector: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape = shape
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
            self.layers = nn.ModuleList(map(ServingLayer, shape.layers(vector)))  # type: ignore[assignment]
            self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
            self.lm_head = InputMajorLinear(shape.hidden_size, shape.vocab_size, bias=False)
        self.to(dtype).to_empty(device=device)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for name, table in zip(("rope_cos", "rope_sin"), rope_table(shape), strict=True):
            self.register_buffer(name, table.to(device), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def of(
        cls, decoder: Decoder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ServingModel":
        """A plain decoder's weights in this form."""
        model = cls(decoder.shape, decoder.kv_heads, device, dtype)
        for own, layer in zip(model.layers, decoder.model.layers, strict=True):
            own.load(layer)
        with torch.no_grad():
            model.embed_tokens.weight.copy_(decoder.model.embed_tokens.weight)
            model.lm_head.weight.copy_(decoder.lm_head.weight)
            model.norm.weight.copy_(decoder.model.norm.weight)
        return model

    def forward(self, tokens_BT: Tensor, caches: Sequence[LayerCache], last: Position = None) -> Tensor:
        """Logits BV of the last position; see `ServingLayer.forward`."""
        rope = self.rope_cos, self.rope_sin
        x_BTD, partials_NBTD = run_layers(self.layers, self.embed_tokens(tokens_BT), rope, caches, last)
        return last_logits(x_BTD, partials_NBTD, self.norm, self.lm_head, last)


def run_layers(
    layers: Iterable[nn.Module], x_BTD: Tensor, rope: Rope, caches: Sequence[LayerCache], last: Position
) -> tuple[Tensor, Tensor]:
    """Layers one after the other, a cache each; see `ServingLayer.forward`."""
    partials_NBTD = no_partials(x_BTD)
    for layer, cache in zip(layers, caches, strict=True):
        x_BTD, partials_NBTD = layer(x_BTD, partials_NBTD, rope, cache, last)
    return x_BTD, partials_NBTD


def no_partials(x_BTD: Tensor) -> Tensor:
    """What is still to be added to the residual stream before the first layer: nothing."""
    return x_BTD.new_empty((0, *x_BTD.shape))


def last_logits(x_BTD: Tensor, partials_NBTD: Tensor, norm: RMSNorm, head: nn.Module, last: Position) -> Tensor:
    """Logits BV of the last position of the residual stream."""
    return head(residual_norm(x_BTD[:, -1:], partials_NBTD[:, :, -1:], norm, last)[1][:, 0])  # type: ignore[no-any-return]


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Draws weights that are good for timing only; norms are one."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.data.fill_(1.0)
