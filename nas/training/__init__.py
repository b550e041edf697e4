"""One training loop for the supernet, a sub-network and a finetuned model."""

from nas.training.loop import fit
from nas.training.parallel import training_device, whole_state
from nas.training.text import check_memory, supernet_loss, text_loss, window_length

__all__ = ["check_memory", "fit", "supernet_loss", "text_loss", "training_device", "whole_state", "window_length"]
