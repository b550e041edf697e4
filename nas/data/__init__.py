"""From text to seeded batches of token ids."""

from nas.data.batches import training_batch, validation_windows
from nas.data.tokens import TokenData, prepare_tokens

__all__ = ["TokenData", "prepare_tokens", "training_batch", "validation_windows"]
