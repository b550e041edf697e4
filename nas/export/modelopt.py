"""The dialect of NVIDIA's ModelOpt and Megatron-Bridge: a plain model type, with each layer's K/V heads beside it.

Those read `block_configs` with ``attention.num_key_value_heads`` and ``ffn.intermediate_size``, and change
transformers' Llama or Qwen3 as they load it; transformers alone cannot.
"""

from typing import Any

from torch import Tensor

from nas.export.uniform import UniformExporter, plain_state
from nas.model import Decoder


class ModelOptExporter(UniformExporter):
    """See `nas.export.Exporter`."""

    form, usage = "modelopt", ""

    def config(self, model: Decoder) -> dict[str, Any]:
        ffn = {"no_op": False, "intermediate_size": model.shape.intermediate_size}
        blocks = [
            {"attention": {"no_op": False, "num_key_value_heads": groups}, "ffn": ffn} for groups in model.kv_heads
        ]
        return super().config(model) | {"num_key_value_heads": max(model.kv_heads), "block_configs": blocks}

    def state(self, model: Decoder) -> dict[str, Tensor]:
        return plain_state(model)

    def notes(self, model: Decoder) -> list[str]:  # noqa: ARG002
        return [
            "`block_configs` in config.json hold each layer's K/V heads and FFN width, as ModelOpt (Puzzletron's "
            "AnyModel) and Megatron-Bridge read them. transformers, vLLM and llama.cpp do not read those: they need "
            "the formats `hf` and `gguf`."
        ]
