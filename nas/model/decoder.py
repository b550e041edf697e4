"""A Llama-style decoder in plain PyTorch whose layers may differ in their number of KV groups.

RMSNorm, rotary embeddings in Hugging Face's half-split form, SwiGLU; where the shape asks for them, also what Llama's
relatives have: biases, norms of queries and keys, stretched rotary embeddings. Tensor names are those of a Hugging Face
checkpoint, so exporting a state dict needs no renaming.

Shape suffixes: B rows of a batch, T tokens, D model width, H query heads, G K/V heads that attention reads,
S K/V heads that are stored as weights, R query heads of one group (H / G), C cache length, d head width,
E = H d, L layers, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.hardware import compile_layers
from nas.shape import LayerSpec, LinearSpec, ModelShape

Rope = tuple[Tensor, Tensor]

_LOGITS = 2**26  # in memory at once while losses are evaluated, 256 MiB


def rope_table(shape: ModelShape) -> Rope:
    """Cosines and sines of every position, each (max_position_embeddings, d), in fp32."""
    frequencies, amplitude = rope_frequencies(shape, shape.rope_scaling)
    angles = torch.outer(torch.arange(shape.max_position_embeddings, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rope_frequencies(shape: ModelShape, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """Frequencies (d / 2) and the factor of sines and cosines, scaled as transformers does it, or plain."""
    if scaling is None:
        steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        return shape.rope_theta**-steps, 1.0
    from transformers import LlamaConfig  # heavy, and only stretched embeddings need it
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    original = scaling.get("original_max_position_embeddings", shape.max_position_embeddings)
    config = LlamaConfig(
        hidden_size=shape.num_attention_heads * shape.head_dim,
        num_attention_heads=shape.num_attention_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=int(original * scaling["factor"]),  # decides nothing, but must fit the other values
        rope_theta=shape.rope_theta,
        rope_scaling=dict(scaling),
    )
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq, rotary.attention_scaling


def rotate(x_BnTd: Tensor, rope: Rope) -> Tensor:
    """Applies rotary embeddings to heads; ``rope`` holds the rows of the T positions."""
    cos_Td, sin_Td = rope
    first, second = x_BnTd.chunk(2, dim=-1)
    return (x_BnTd * cos_Td + torch.cat((-second, first), dim=-1) * sin_Td).to(x_BnTd.dtype)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square layer norm, computed in fp32 as Llama does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def untied(shape: ModelShape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict as it is stored: without a head that is the embedding."""
    return {name: x for name, x in state.items() if not (shape.tie_word_embeddings and name == "lm_head.weight")}


def _linear(spec: LinearSpec) -> nn.Linear:
    return nn.Linear(spec.inputs, spec.outputs, spec.bias)


class Attention(nn.Module):
    """Causal grouped-query attention.

    With a ``selection`` (B, G, S) each row of the batch attends over its own G mixtures of the S stored heads: that
    is all the supernet needs, and perhaps a ``correction`` of what comes out. Without a selection, G = S.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.correction: OutputCorrection | None = None
        self.head_dim, self.qk_norm = spec.shape.head_dim, spec.shape.qk_norm
        self.q_proj = _linear(spec.linears["q_proj"])
        self.k_proj = _linear(spec.linears["k_proj"])
        self.v_proj = _linear(spec.linears["v_proj"])
        self.o_proj = _linear(spec.linears["o_proj"])
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, spec.shape.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, spec.shape.rms_norm_eps)

    def forward(self, x_BTD: Tensor, rope: Rope, selection_BGS: Tensor | None = None) -> Tensor:
        q_BHTd = self._heads(self.q_proj(x_BTD))
        k_BGTd = self._heads(self.k_proj(x_BTD))
        v_BGTd = self._heads(self.v_proj(x_BTD))
        if selection_BGS is not None:
            k_BGTd, v_BGTd = select_heads(selection_BGS, k_BGTd), select_heads(selection_BGS, v_BGTd)
        if self.qk_norm:  # after the mixing: a norm of mixtures is no mixture of norms
            q_BHTd, k_BGTd = self.q_norm(q_BHTd), self.k_norm(k_BGTd)
        q_BHTd, k_BGTd = rotate(q_BHTd, rope), rotate(k_BGTd, rope)
        out_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True, enable_gqa=True)
        out_BTE = out_BHTd.transpose(1, 2).flatten(2)
        out_BTD: Tensor = self.o_proj(out_BTE)
        return out_BTD if self.correction is None else out_BTD + self.correction(out_BTE, selection_BGS)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]


def select_heads(selection_BGS: Tensor, x_BSTd: Tensor) -> Tensor:
    """Each row's own G mixtures of the S stored heads, BGTd."""
    selection_BGS = selection_BGS.to(x_BSTd.dtype)
    if torch.compiler.is_compiling():  # the compiler fuses a sum with the rotation that follows, but no GEMM
        return (selection_BGS[..., None, None] * x_BSTd.unsqueeze(1)).sum(2)
    return torch.einsum("bgs,bstd->bgtd", selection_BGS, x_BSTd)


class OutputCorrection(nn.Module):
    """What each smaller choice of a layer adds to the output projection: a matrix of its own, of a low rank.

    All of them are computed side by side, W = rank × smaller choices, and each row of a batch keeps its own. Rows at
    the largest choice add zero, and so do all at first.
    """

    owners_SW: Tensor  # 1 where a stored head belongs to the choice

    def __init__(self, projection: nn.Linear, choices: Sequence[int], rank: int) -> None:
        super().__init__()
        columns = rank * (len(choices) - 1)
        self.down = nn.Linear(projection.in_features, columns, bias=False)
        self.up = nn.Linear(columns, projection.out_features, bias=False)
        drawn = torch.randn(self.down.weight.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        self.down.weight.data.copy_(drawn / projection.in_features**0.5)
        self.up.weight.data.zero_()
        owner = [choice for choice, groups in enumerate(choices) for _ in range(groups)]
        owners = torch.eye(len(choices))[owner, :-1].repeat_interleave(rank, dim=1)
        self.register_buffer("owners_SW", owners, persistent=False)

    def forward(self, x_BTE: Tensor, selection_BGS: Tensor) -> Tensor:
        own_BW, low_BTW = selection_BGS[:, 0] @ self.owners_SW, self.down(x_BTE)
        return self.up(low_BTW * own_BW[:, None].to(low_BTW.dtype))  # type: ignore[no-any-return]

    def matrix(self, mixture_GS: Tensor) -> Tensor:
        """What the choice with this mixture adds to the projection's weight."""
        own_W = mixture_GS[0].to(self.owners_SW) @ self.owners_SW
        return (self.up.weight * own_W) @ self.down.weight


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.gate_proj = _linear(spec.linears["gate_proj"])
        self.up_proj = _linear(spec.linears["up_proj"])
        self.down_proj = _linear(spec.linears["down_proj"])

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.shape.hidden_size, spec.shape.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.shape.hidden_size, spec.shape.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x_BTD: Tensor, rope: Rope, selection_BGS: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, selection_BGS)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))  # type: ignore[no-any-return]


class _Trunk(nn.Module):
    """What Hugging Face calls ``model``: everything but the output head."""

    layers: Sequence[Layer]

    def __init__(self, shape: ModelShape, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(map(Layer, specs))  # type: ignore[assignment]
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model with ``kv_heads[l]`` K/V heads in layer ``l``; a plain model's are its group vector."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, shape: ModelShape, kv_heads: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.kv_heads = shape, tuple(kv_heads)
        self.model = _Trunk(shape, shape.layers(kv_heads))
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos, sin = rope_table(shape)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws fresh weights: normal with deviation 0.02, smaller where a projection ends on the residual stream
        (deviation / sqrt(2 layers), as in GPT-2); norms start at one, biases at zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * len(self.kv_heads)) ** 0.5 if residual else 0.02
            parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens_BT: Tensor, selections: Sequence[Tensor] | None = None) -> Tensor:
        """Logits BTV of every position; a supernet passes a selection (B, G, S) per layer."""
        x_BTD, rope = self.model.embed_tokens(tokens_BT), self.rope(0, tokens_BT.shape[1])
        for index, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, rope, selections[index] if selections is not None else None)
        return self.lm_head(self.model.norm(x_BTD))  # type: ignore[no-any-return]

    def rope(self, start: int, end: int) -> Rope:
        """The rows of the rotary table for the positions from ``start`` up to ``end``."""
        return self.rope_cos[start:end], self.rope_sin[start:end]

    def row_losses(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss (nats per token) of each row (B,) of what comes out of the last layer, logits made in pieces."""
        tokens = max(1, _LOGITS // self.shape.vocab_size)
        pieces = zip(x_BTD.flatten(0, 1).split(tokens), targets_BT.flatten().split(tokens), strict=True)
        return torch.cat([self.token_losses(*piece) for piece in pieces]).view(targets_BT.shape).mean(1)

    def token_losses(self, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Losses (N,) in nats. Logits are in fp32 under autocast too: half precision would blur small differences."""
        with torch.autocast(x_ND.device.type, enabled=False):
            head = self.lm_head.weight.float()  # a frozen one may be in half precision
            return F.cross_entropy(F.linear(self.model.norm(x_ND.float()), head), targets_N, reduction="none")

    def compile_layers(self) -> None:
        """Compiles the layers and the losses of tokens; a UserError where there is no compiler."""
        compile_layers(self.model.layers, "a machine that has one")
        self.token_losses = torch.compile(self.token_losses)  # type: ignore[method-assign]
