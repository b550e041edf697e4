"""The shape of a model: all that fixes a Llama-style decoder apart from its KV groups; without torch.

Field names are those of a Hugging Face Llama configuration, so that there is one vocabulary from the YAML file to the
exported model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

# What not every Llama-style decoder has; a shape, a table or a run that does not mention them has none.
FEATURES = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "rope_scaling")

_KINDS = {int: "a positive integer", float: "a positive number", bool: "true or false"}
_ROPE_KINDS = {"original_max_position_embeddings": int, "truncate": bool}  # and all others positive numbers
_NEEDS_ORIGINAL = ("factor", "original_max_position_embeddings")
ROPE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # by rope_type: what it needs, what it may have
    "linear": (("factor",), ()),
    "llama3": ((*_NEEDS_ORIGINAL, "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (_NEEDS_ORIGINAL, ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}


@dataclass(frozen=True)
class LinearSpec:
    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs + self.bias)


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. Modules, parameter counts, memory, operations and exports all follow from this description."""

    shape: "ModelShape"
    kv_groups: int

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """The linear layers by their Hugging Face names, in the order in which they run."""
        shape, width, ffn = self.shape, self.shape.hidden_size, self.shape.intermediate_size
        queries, keys = shape.num_attention_heads * shape.head_dim, self.kv_groups * shape.head_dim
        return {
            "q_proj": LinearSpec(width, queries, shape.qkv_bias),
            "k_proj": LinearSpec(width, keys, shape.qkv_bias),
            "v_proj": LinearSpec(width, keys, shape.qkv_bias),
            "o_proj": LinearSpec(queries, width, shape.o_bias),
            "gate_proj": LinearSpec(width, ffn, shape.mlp_bias),
            "up_proj": LinearSpec(width, ffn, shape.mlp_bias),
            "down_proj": LinearSpec(ffn, width, shape.mlp_bias),
        }

    @property
    def norms(self) -> dict[str, int]:
        """Widths of the RMS norms by their Hugging Face names."""
        width, head_dim = self.shape.hidden_size, self.shape.head_dim
        heads = {"q_norm": head_dim, "k_norm": head_dim} if self.shape.qk_norm else {}
        return {"input_layernorm": width, "post_attention_layernorm": width, **heads}

    @cached_property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears.values()) + sum(self.norms.values())

    @cached_property
    def kv_values_per_token(self) -> int:
        """Values that one token of one sequence adds to the KV cache."""
        return 2 * self.kv_groups * self.shape.head_dim


@dataclass(frozen=True)
class ModelShape:
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are RMS-normalised per head before they are rotated, as in Qwen3
    rope_scaling: Mapping[str, Any] | None = None  # of rotary embeddings, in Hugging Face's words; see `ROPE_KEYS`

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type in _KINDS:
                _check_kind(field.name, getattr(self, field.name), field.type)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim} but rotary embeddings need an even one")
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)

    def layer(self, groups: int) -> LayerSpec:
        if groups not in self._made:
            self._made[groups] = LayerSpec(self, groups)
        return self._made[groups]

    @cached_property
    def _made(self) -> dict[int, LayerSpec]:  # a search asks for the costs of very many vectors
        return {}

    def layers(self, vector: Sequence[int]) -> list[LayerSpec]:
        return [self.layer(groups) for groups in vector]

    def parameters(self, vector: Sequence[int]) -> int:
        """Parameters of the whole model at ``vector``; a tied embedding counts once."""
        embedding_and_head = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embedding_and_head + self.hidden_size + sum(layer.parameters for layer in self.layers(vector))

    def kv_bytes_per_token(self, vector: Sequence[int], dtype_bytes: int) -> int:
        """Bytes that one token of one sequence takes in the KV cache, over all layers."""
        return dtype_bytes * sum(layer.kv_values_per_token for layer in self.layers(vector))

    def to_dict(self) -> dict[str, Any]:
        """The shape as plain values, without the features that it does not have."""
        values = asdict(self)
        return {key: value for key, value in values.items() if value or key not in FEATURES}


def _check_kind(name: str, value: Any, kind: type) -> None:
    numbers = int if kind is int else (int, float)
    positive = isinstance(value, numbers) and not isinstance(value, bool) and value > 0
    if not (isinstance(value, bool) if kind is bool else positive):
        raise ValueError(f"{name} is {value!r} but must be {_KINDS[kind]}")


def _check_rope_scaling(scaling: object) -> None:
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") not in ROPE_KEYS:
        raise ValueError(f"rope_scaling is {scaling!r} but needs a rope_type, one of {', '.join(ROPE_KEYS)}")
    kind = scaling["rope_type"]
    needed, optional = ROPE_KEYS[kind]
    if missing := [key for key in needed if key not in scaling]:
        raise ValueError(f"rope_scaling of rope_type {kind} lacks {', '.join(missing)}; add it")
    for key, value in scaling.items():
        if key not in (*needed, *optional, "rope_type"):
            raise ValueError(f"rope_scaling of rope_type {kind} has an unknown key {key}; remove it")
        if key != "rope_type":
            _check_kind(f"rope_scaling.{key}", value, _ROPE_KINDS.get(key, float))
