"""Plain Llama, Qwen2 or Qwen3, for what refuses layers of different KV groups: lossless, but it saves nothing.

K/V heads are repeated until every layer has as many, the least common multiple of the vector's groups; attention over
repeated heads is attention over the fewer ones.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from nas.errors import UserError
from nas.export.card import Card
from nas.export.hf import HfDirectory, llama_keys, untied_state
from nas.model import Decoder
from nas.shape import ModelShape

_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```
"""


class UniformExporter(HfDirectory):
    """See `nas.export.Exporter`."""

    def check(self, shape: ModelShape, tokenizer: Path | None) -> None:  # noqa: ARG002
        if shape.qk_norm and shape.mlp_bias:
            raise UserError(
                "no plain model type has both norms of queries and keys (qk_norm) and biases in its FFN (mlp_bias); "
                "use export=hf"
            )

    def config(self, model: Decoder) -> dict[str, Any]:
        return plain_config(model.shape) | {"num_key_value_heads": math.lcm(*model.kv_heads)}

    def state(self, model: Decoder) -> dict[str, Tensor]:
        state = plain_state(model)
        for layer, groups in enumerate(model.kv_heads):
            for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
                if (key := f"model.layers.{layer}.self_attn.{name}") in state:
                    heads = state[key].unflatten(0, (groups, -1))
                    state[key] = heads.repeat_interleave(math.lcm(*model.kv_heads) // groups, dim=0).flatten(0, 1)
        return state

    def card(self, model: Decoder) -> Card:
        note = f"Its K/V heads are repeated to {math.lcm(*model.kv_heads)} in every layer, so that it is a plain model "
        note += "which every engine takes. It computes the same and saves nothing: the KV cache is that of the largest."
        return Card("uniform", "transformers", _USAGE, [note])


def plain_config(shape: ModelShape) -> dict[str, Any]:
    """The config.json of the plain model type that computes a shape: Qwen3 has norms, Qwen2 biases of q, k and v."""
    kind, keys = "llama", {"attention_bias": shape.qkv_bias or shape.o_bias}
    if shape.qk_norm:
        kind = "qwen3"
    elif shape.qkv_bias and not shape.o_bias and not shape.mlp_bias:
        kind, keys = "qwen2", {}
    return {"architectures": [f"{kind.title()}ForCausalLM"], "model_type": kind, **llama_keys(shape), **keys}


def plain_state(model: Decoder) -> dict[str, Tensor]:
    """The state dict with zeros for biases that `plain_config`'s type has and the shape does not."""
    state = untied_state(model)
    if plain_config(model.shape).get("attention_bias"):
        for name, tensor in list(state.items()):
            module, _, kind = name.rpartition(".")
            if ".self_attn." in name and module.endswith("_proj") and kind == "weight":
                state.setdefault(f"{module}.bias", tensor.new_zeros(len(tensor)))
    return state
