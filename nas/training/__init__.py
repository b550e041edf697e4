"""One training loop for the supernet, a sub-network and a finetuned model."""

from nas.training.loop import fit, full_state_dict, training_device
from nas.training.recipes import check_training_memory, supernet_loss, text_loss, window_length

__all__ = [
    "check_training_memory",
    "fit",
    "full_state_dict",
    "supernet_loss",
    "text_loss",
    "training_device",
    "window_length",
]
