"""What a training step computes on windows of text, for any model that maps tokens to logits."""

from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from nas.config import TrainConfig
from nas.data import training_batch
from nas.data.tokens import Tokens
from nas.errors import UserError
from nas.quality import row_losses
from nas.space import ModelShape, Vector
from nas.training.loop import autocast, training_device


def window_length(options: TrainConfig, context: int) -> int:
    """Tokens of a training window.

    Raises:
        UserError: train.length is beyond the model's context.
    """
    if options.length is not None and options.length > context:
        raise UserError(f"train.length is {options.length} but the model's context is {context}; lower it")
    return options.length or context


def check_memory(what: str, options: TrainConfig, shape: ModelShape, vector: Vector) -> None:
    """Refuses a training that cannot fit into this machine, counting only what is certain.

    That is 16 bytes a parameter (fp32 weight, gradient and AdamW's two moments) and the fp32 logits of one step.

    Args:
        what: What is trained, for the sentence.
        options: How to train it.
        shape: Its shape.
        vector: Its K/V heads a layer.

    Raises:
        UserError: It does not fit, or train.length is beyond the model's context.
    """
    length, device = window_length(options, shape.max_position_embeddings), training_device()
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    state, logits = 16 * shape.parameters(vector), 4 * options.batch * length * shape.vocab_size
    if state + logits > total:
        raise UserError(
            f"training {what} takes at least {state / 2**30:.1f} GiB for weights and optimizer and "
            f"{logits / 2**30:.1f} for the logits of {options.batch} rows, but the {device.type} has "
            f"{total / 2**30:.1f}; lower train.batch or train.length, or take a smaller space or a larger machine"
        )


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
