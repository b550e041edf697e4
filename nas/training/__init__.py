"""One training loop for the supernet, a sub-network and a finetuned model."""
