"""The model as it is served, and as it is timed: a static KV cache, the decode step on three runtimes, generation."""

from nas.serving.cache import KVCache, LayerCache
from nas.serving.generation import generate
from nas.serving.layers import ServingLayer, ServingModel
from nas.serving.runtime import Runner

__all__ = ["KVCache", "LayerCache", "Runner", "ServingLayer", "ServingModel", "generate"]
