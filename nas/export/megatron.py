"""Megatron-Core's form: the configuration that a model is trained from the start by, without weights.

``heterogeneous_layers_config.json`` is what `HeterogeneousTransformerConfig` takes, and ``model_arguments.json`` what
that class and `GPTModel` take beside it. The command line of Megatron-LM refuses layers that differ in groups.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.errors import UserError
from nas.export.card import write_card
from nas.files import write_json
from nas.model import Decoder
from nas.shape import ModelShape

LAYERS, ARGUMENTS = "heterogeneous_layers_config.json", "model_arguments.json"
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_USAGE = f"""```python
arguments = json.load(open("{ARGUMENTS}"))
config = HeterogeneousTransformerConfig(
    heterogeneous_layers_config_path="{LAYERS}", activation_func=torch.nn.functional.silu, **arguments["config"]
)
model = GPTModel(config, get_gpt_heterogeneous_layer_spec(config, use_te=True), **arguments["model"])
```
"""
_NOTE = (
    "It has no weights. The tensor parallelism must divide every layer's groups or be divided by them; a layer with "
    "fewer groups than ranks is replicated, and saves less."
)


class MegatronExporter:
    """See `nas.export.Exporter`."""

    of_served = True

    def check(self, shape: ModelShape, tokenizer: Path | None) -> None:  # noqa: ARG002
        if shape.o_bias != shape.mlp_bias or (shape.o_bias and not shape.qkv_bias):
            raise UserError(
                "megatron cannot hold this model: Megatron-Core has one switch for the biases of output projection and "
                "FFN, with which q, k and v have them too; use export=config"
            )
        _rope(shape)

    def write(self, model: Decoder, tokenizer: Path | None, folder: Path, card: Mapping[str, str]) -> None:  # noqa: ARG002
        kept, shape = {"no_op": False, "replace_with_linear": False}, model.shape
        ffn = {"ffn_hidden_size": shape.intermediate_size, **kept}
        blocks = [{"attention": {"num_query_groups": groups, **kept}, "ffn": ffn} for groups in model.kv_heads]
        config: dict[str, Any] = {
            "num_layers": shape.num_hidden_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "kv_channels": shape.head_dim,
            "num_query_groups": max(model.kv_heads),
            "ffn_hidden_size": shape.intermediate_size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": shape.rms_norm_eps,
            "gated_linear_unit": True,
            "add_bias_linear": shape.o_bias,
            "add_qkv_bias": shape.qkv_bias,
            "qk_layernorm": shape.qk_norm,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        arguments: dict[str, Any] = {
            "vocab_size": shape.vocab_size,
            "max_sequence_length": shape.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": shape.rope_theta,
            **_rope(shape),
            "share_embeddings_and_output_weights": shape.tie_word_embeddings,
        }
        write_json(folder / LAYERS, {"block_configs": blocks})
        write_json(folder / ARGUMENTS, {"config": config, "model": arguments})
        write_card("megatron", model, folder, card, [_NOTE], _USAGE)


def _rope(shape: ModelShape) -> dict[str, Any]:
    """GPTModel's arguments for scaled rotary embeddings."""
    scaling = dict(shape.rope_scaling or {})
    kind, factor = scaling.pop("rope_type", None), scaling.pop("factor", None)
    if kind is None:
        return {}
    if kind == "linear":
        return {"seq_len_interpolation_factor": factor}
    if kind == "llama3" and scaling == _LLAMA_3:
        return {"rope_scaling": True, "rope_scaling_factor": factor}
    raise UserError(
        f"megatron cannot hold rope_scaling {shape.rope_scaling}: Megatron-Core's GPTModel scales linearly or as "
        "Llama 3.1 does from 8192 tokens; use export=config"
    )
