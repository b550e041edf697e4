"""A Llama whose layers differ in their number of key/value heads (variable grouped-query attention).

This file travels with every exported model: `trust_remote_code=True` lets transformers load it. The configuration's
`block_configs` follow the nemotron-nas convention of inference engines; vLLM reads them as attributes, through the
configuration class below.
"""

import copy

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention


class Block(dict):
    """A JSON object whose keys are attributes too, as inference engines expect of block configs."""

    def __init__(self, values):
        super().__init__({key: Block(value) if isinstance(value, dict) else value for key, value in values.items()})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), qkv_bias=None, qk_norm=False, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Block(block) for block in block_configs]
        self.qkv_bias = self.attention_bias if qkv_bias is None else qkv_bias  # attention_bias: the output projection's
        self.qk_norm = qk_norm

    def to_dict(self):  # transformers 5 keeps these inside rope_parameters alone; engines read them here
        values = super().to_dict()
        parameters = dict(values.get("rope_parameters") or {})
        values["rope_theta"] = parameters.pop("rope_theta", values.get("rope_theta"))
        if parameters.get("rope_type", "default") != "default":
            values["rope_scaling"] = parameters
        return values


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
        own.attention_bias = config.qkv_bias
        layer = LlamaDecoderLayer(own, index)
        if config.qk_norm:  # Qwen3's attention is Llama's with norms of queries and keys
            own.layer_types = ["full_attention"] * config.num_hidden_layers
            layer.self_attn = Qwen3Attention(own, index)
        if config.qkv_bias != config.attention_bias:
            old = layer.self_attn.o_proj
            layer.self_attn.o_proj = nn.Linear(old.in_features, old.out_features, bias=config.attention_bias)
        layer.self_attn.config = config  # one config, so that a later change of attention kernel reaches every layer
        return layer


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()
