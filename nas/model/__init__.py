"""A plain Llama-style decoder with a number of KV groups per layer, and the supernet that makes them elastic."""

from nas.model.decoder import Decoder
from nas.model.supernet import Supernet

__all__ = ["Decoder", "Supernet"]
