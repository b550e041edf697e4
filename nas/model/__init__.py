"""A plain Llama-style decoder with one number of KV groups a layer, and the supernet that makes them elastic."""

from nas.model.decoder import Decoder
from nas.model.supernet import Supernet

__all__ = ["Decoder", "Supernet"]
