"""A Llama whose layers differ in their number of key/value heads (variable grouped-query attention).

This file travels with every exported model: `trust_remote_code=True` lets transformers load it. The configuration's
`block_configs` follow the nemotron-nas convention of inference engines; vLLM reads them as attributes, through the
configuration class below.
"""

import copy

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class Block(dict):
    """A JSON object whose keys are attributes too, as inference engines expect of block configs."""

    def __init__(self, values):
        super().__init__({key: Block(value) if isinstance(value, dict) else value for key, value in values.items()})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __deepcopy__(self, memo):
        return Block(copy.deepcopy(dict(self), memo))


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Block(block) for block in block_configs]

    def to_dict(self):  # transformers 5 keeps the base inside rope_parameters alone; engines read it here
        values = super().to_dict()
        parameters = values.get("rope_parameters") or {}
        return {**values, "rope_theta": parameters.get("rope_theta", values.get("rope_theta"))}


class DeciLMModel(LlamaModel):
    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(self._layer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    @staticmethod
    def _layer(config, index):
        own = copy.copy(config)
        own.num_key_value_heads = config.num_attention_heads // config.block_configs[index].attention.n_heads_in_group
        layer = LlamaDecoderLayer(own, index)
        layer.self_attn.config = config  # one config, so that a later change of attention kernel reaches every layer
        return layer


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()
