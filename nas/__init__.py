"""Neural architecture search for the KV groups of every layer of a language model."""

__version__ = "0.1.0"
