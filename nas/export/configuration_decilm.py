"""The configuration of a Llama whose layers differ in their number of key/value heads; loads without torch.

It travels with every exported model, beside modeling_decilm.py: `trust_remote_code=True` lets transformers load both.
`block_configs` follow the nemotron-nas convention of inference engines, which read them as attributes.
"""

from transformers import LlamaConfig


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


class DeciLMQKNormConfig(DeciLMConfig):
    """With norms of queries and keys, which no engine's nemotron-nas code knows.

    Under a type of its own, vLLM runs transformers' code instead, and reads each layer's heads from per_layer_config,
    which transformers has had since 5.15.
    """

    model_type = "nemotron-nas-qk-norm"

    def __init__(self, block_configs=(), **kwargs):
        if block_configs:
            heads = kwargs["num_attention_heads"]
            groups = (heads // block["attention"]["n_heads_in_group"] for block in block_configs)
            kwargs["per_layer_config"] = {index: {"num_key_value_heads": g} for index, g in enumerate(groups)}
        super().__init__(block_configs=block_configs, **kwargs)
        self.allow_global_per_layer_attribute_access = True
