"""What a training step computes on windows of text, for a plain model and for a supernet."""

import itertools

import psutil
import torch
from torch import Tensor, nn

from nas.config import SupernetConfig, TrainConfig
from nas.data import training_batch
from nas.data.tokens import Tokens
from nas.distributed import SIZE
from nas.errors import UserError
from nas.quality import row_losses
from nas.shape import ModelShape
from nas.space import SearchSpace, Vector
from nas.training.loop import Loss, Microbatch, autocast
from nas.training.parallel import training_device
from nas.training.recipes import distilled_loss, step_plan


def window_length(options: TrainConfig, context: int) -> int:
    if options.length is not None and options.length > context:
        raise UserError(f"train.length is {options.length} but the model's context is {context}; lower it")
    return options.length or context


def check_training_memory(what: str, options: TrainConfig, shape: ModelShape, vector: Vector) -> None:
    """Refuses a training that cannot fit into this machine, counting only what is certain.

    That is 16 bytes per parameter (fp32 weight, gradient, AdamW's two moments) and a microbatch's logits in fp32.
    """
    length, device = window_length(options, shape.max_position_embeddings), training_device()
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    rows = max(1, options.batch // (options.accumulate * SIZE))
    state = 16 * shape.parameters(vector) // (SIZE if options.parallel == "fsdp" else 1)
    logits = 4 * rows * length * shape.vocab_size
    if state + logits > total:
        raise UserError(
            f"training {what} takes at least {state / 2**30:.1f} GiB for weights and optimizer and "
            f"{logits / 2**30:.1f} for the logits of {rows} rows, but the {device.type} has "
            f"{total / 2**30:.1f}; lower train.batch or train.length, or take a smaller space or a larger machine"
        )


def text_loss(tokens: Tokens, options: TrainConfig, length: int) -> Loss:
    """The loss of a step of a plain model on windows of ``length`` tokens."""
    losses = torch.compile(row_losses) if options.compile else row_losses

    def loss_at(model: nn.Module, step: int, microbatch: Microbatch) -> Tensor:
        device = next(model.parameters()).device
        own = microbatch.of(options.batch)
        windows = training_batch(tokens, options.seed, step, options.batch, length, own).to(device)
        with autocast(options.precision, device):
            return losses(model(windows[:, :-1]), windows[:, 1:]).mean()

    return loss_at


def supernet_loss(space: SearchSpace, tokens: Tokens, options: SupernetConfig, length: int) -> Loss:
    """The loss of a step of a supernet by its recipe."""
    losses = torch.compile(distilled_loss) if options.compile else distilled_loss

    def loss_at(model: nn.Module, step: int, microbatch: Microbatch) -> Tensor:
        plan = step_plan(space, options, step)
        own, vectors_per_text = microbatch.of(len(plan)), len(plan[0])
        device = next(model.parameters()).device
        windows = training_batch(tokens, options.seed, step, len(plan), length, own).to(device)
        rows = windows.repeat_interleave(vectors_per_text, dim=0)
        choices_BL = space.choice_indices(itertools.chain.from_iterable(plan[own]))
        with autocast(options.precision, device):
            logits = model(rows[:, :-1], torch.tensor(choices_BL, device=device))
            return losses(
                logits, rows[:, 1:], vectors_per_text, options.distillation_weight, options.distillation_temperature
            )

    return loss_at
