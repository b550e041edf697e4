"""Plain Llama or Qwen3, for what refuses layers of different KV groups: lossless, but it saves nothing.

K/V heads are repeated until every layer has as many, the least common multiple of the vector's groups; attention over
repeated heads is attention over the fewer ones.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.errors import UserError
from nas.export.hf import LOADING, HfExporter, llama_keys
from nas.model import Decoder
from nas.model.decoder import untied
from nas.model.supernet import with_mixed_heads
from nas.shape import ModelShape


class UniformExporter(HfExporter):
    """See `nas.export.Exporter`."""

    form, has_code, usage = "uniform", False, LOADING.format(code="")

    def check(self, shape: ModelShape, tokenizer: Path | None) -> None:  # noqa: ARG002
        if shape.qk_norm and shape.mlp_bias:
            raise UserError(
                "no plain model type has both norms of queries and keys (qk_norm) and biases in its FFN (mlp_bias); "
                "use export=hf"
            )

    def config(self, model: Decoder) -> dict[str, Any]:
        """That of the plain model type that computes the shape: Llama, or Qwen3 where there are norms.

        Not Qwen2, whose output projection has no bias: transformers 5 gives every model of that type Qwen's tokenizer.
        """
        shape, kind = model.shape, "qwen3" if model.shape.qk_norm else "llama"
        return {
            "architectures": [f"{kind.title()}ForCausalLM"],
            "model_type": kind,
            **llama_keys(shape),
            "attention_bias": shape.qkv_bias or shape.o_bias,
            "num_key_value_heads": math.lcm(*model.kv_heads),
        }

    def state(self, model: Decoder) -> dict[str, Tensor]:
        heads = math.lcm(*model.kv_heads)
        repeated = (torch.eye(groups).repeat_interleave(heads // groups, dim=0) for groups in model.kv_heads)
        return with_mixed_heads(plain_state(model), repeated)

    def notes(self, model: Decoder) -> list[str]:
        heads = math.lcm(*model.kv_heads)
        return [
            f"Its K/V heads are repeated to {heads} in every layer, so that it is a plain model, which every engine "
            "takes. It computes the same and saves nothing: each layer's KV cache is the largest's."
        ]


def plain_state(model: Decoder) -> dict[str, Tensor]:
    """The state dict with zeros for biases that the plain type has and the shape does not."""
    state = untied(model.shape, model.state_dict())
    if model.shape.qkv_bias or model.shape.o_bias:
        for name, tensor in list(state.items()):
            module, _, kind = name.rpartition(".")
            if ".self_attn." in name and module.endswith("_proj") and kind == "weight":
                state.setdefault(f"{module}.bias", tensor.new_zeros(len(tensor)))
    return state
