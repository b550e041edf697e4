"""One training loop for the supernet, a sub-network and a finetuned model."""

from nas.training.loop import fit, training_device
from nas.training.text import check_memory, text_loss, window_length

__all__ = ["check_memory", "fit", "text_loss", "training_device", "window_length"]
