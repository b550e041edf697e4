"""A Llama whose layers differ in their number of key/value heads (variable grouped-query attention)."""

import copy

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_decilm import DeciLMConfig, DeciLMQKNormConfig


class DeciLMModel(LlamaModel):
    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(self._layer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    @staticmethod
    def _layer(config, index):
        own = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else copy.copy(config)
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


class DeciLMQKNormModel(DeciLMModel):
    config_class = DeciLMQKNormConfig


class DeciLMQKNormForCausalLM(DeciLMForCausalLM):
    config_class = DeciLMQKNormConfig
