"""What a training step computes on windows of text, for any model that maps tokens to logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from nas.config import TrainConfig
from nas.data import training_batch
from nas.data.tokens import Tokens
from nas.errors import UserError
from nas.quality import row_losses
from nas.training.loop import autocast


def window_length(options: TrainConfig, context: int) -> int:
    """Tokens of a training window.

    Raises:
        UserError: train.length is beyond the model's context.
    """
    if options.length is not None and options.length > context:
        raise UserError(f"train.length is {options.length} but the model's context is {context}; lower it")
    return options.length or context


def text_loss(
    logits_of: Callable[[Tensor, int], Tensor], tokens: Tokens, options: TrainConfig, length: int, device: torch.device
) -> Callable[[int], Tensor]:
    """The loss of a step by its number, as `fit` wants it.

    Args:
        logits_of: Maps token ids (rows, T) and the step to logits (rows, T, V).
        tokens: The training text.
        options: Rows, seed and precision.
        length: Tokens of a window, T.
        device: Where the model is.
    """

    def loss_at(step: int) -> Tensor:
        batch = training_batch(tokens, options.seed, step, options.batch, length).to(device, non_blocking=True)
        with autocast(options.precision, device):
            return row_losses(logits_of(batch[:, :-1], step), batch[:, 1:]).mean()

    return loss_at
