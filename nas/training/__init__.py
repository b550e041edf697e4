"""One training loop for the supernet, a sub-network and a finetuned model."""

from nas.training.loop import fit, training_device

__all__ = ["fit", "training_device"]
