"""What a training step computes on windows of text: the loss of a plain model, or that of a supernet by its recipe.

A recipe says which texts run at which vectors. They are drawn from the seed and the step number, so that a resumed or
distributed run draws the same. A new recipe is one function and one entry in `RECIPES`.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nas.config import SupernetConfig, TrainConfig
from nas.data import training_batch
from nas.data.tokens import Tokens
from nas.distributed import SIZE
from nas.errors import UserError
from nas.model import Decoder
from nas.quality import row_losses
from nas.space import SearchSpace, Totals, Vector
from nas.training.loop import Loss, Microbatch, autocast, computed_in, training_device

Plan = list[list[Vector]]  # for each text of a step, the vectors that it runs at: as many for each text
Recipe = Callable[[SearchSpace, SupernetConfig, np.random.Generator], Plan]

_PIECE = 512  # tokens whose logits are in fp32 at once
_totals = lru_cache(maxsize=8)(Totals)


def mixed(space: SearchSpace, config: SupernetConfig, rng: np.random.Generator) -> Plan:
    """Every row has a text and a vector of its own: largest and smallest by their shares, the others stratified."""
    largest = int(config.largest_share * config.batch + rng.random())  # rounds up as often as the fraction says
    smallest = int(config.smallest_share * config.batch + rng.random())
    fixed = ([space.largest] * largest + [space.smallest] * smallest)[: config.batch]
    return [[vector] for vector in fixed + _totals(space.choices).draw_stratified(config.batch - len(fixed), rng)]


def sandwich(space: SearchSpace, config: SupernetConfig, rng: np.random.Generator) -> Plan:
    """Each text runs at the largest and the smallest vector and at stratified ones between them."""
    texts, free = config.batch // config.vectors_per_text, config.vectors_per_text - 2
    drawn = _totals(space.choices).draw_stratified(texts * free, rng)
    return [[space.largest, space.smallest, *drawn[text::texts]] for text in range(texts)]


RECIPES: dict[str, Recipe] = {"mixed": mixed, "sandwich": sandwich}


def check_recipe(config: SupernetConfig) -> None:
    """Refuses a recipe that is unknown or whose numbers do not go together."""
    if config.recipe not in RECIPES:
        raise UserError(f"train.recipe is '{config.recipe}'; use {', '.join(RECIPES)}")
    if config.output_rank and config.sharing != "separate":
        raise UserError(f"train.output_rank is {config.output_rank} but train.sharing {config.sharing}; use separate")
    largest, smallest = config.largest_share, config.smallest_share
    if largest + smallest > 1:
        raise UserError(f"train.largest_share {largest} and smallest_share {smallest} exceed 1 together; lower one")
    if config.recipe == "sandwich" and (config.vectors_per_text < 2 or config.batch % config.vectors_per_text):
        raise UserError(
            f"train.vectors_per_text is {config.vectors_per_text} but must be 2 or more and divide train.batch, "
            f"{config.batch}; change one"
        )


def step_plan(space: SearchSpace, config: SupernetConfig, step: int) -> Plan:
    """The texts and vectors of a step, by its number."""
    if step < config.largest_first * config.steps:
        return [[space.largest]] * config.batch
    return RECIPES[config.recipe](space, config, np.random.default_rng([config.seed, step, 1]))


class Distillation(NamedTuple):
    """How logits follow a teacher's."""

    weight: float  # share of the divergence from the teacher's distribution; the rest is cross-entropy
    temperature: float  # of both distributions; the divergence is multiplied by its square
    compiled: bool = False


def distilled_loss(logits_BTV: Tensor, targets_BT: Tensor, vectors_per_text: int, how: Distillation) -> Tensor:
    """Mean loss (nats per token, scalar): cross-entropy for the first vector of a text, `divergence` for the others.

    There are two or more, whose rows lie side by side. The others follow the first one's logits, which are held fixed.
    """
    logits_NKTV, targets_NKT = (x.unflatten(0, (-1, vectors_per_text)) for x in (logits_BTV, targets_BT))
    first = row_losses(logits_NKTV[:, 0], targets_NKT[:, 0]).mean()
    followers, targets = logits_NKTV[:, 1:].flatten(0, 1), targets_NKT[:, 1:].flatten(0, 1)
    others = divergence(followers, logits_NKTV[:, 0].detach(), targets, how)
    return (first + (vectors_per_text - 1) * others) / vectors_per_text


def divergence(logits_BTV: Tensor, teacher_NTV: Tensor, targets_BT: Tensor, how: Distillation) -> Tensor:
    """Mean loss (nats per token, scalar) of rows that follow a teacher: B / N rows side by side for each of its texts.

    Piece by piece, each computed again in the backward pass, for logits in fp32 are large.
    """
    rows = len(logits_BTV) // len(teacher_NTV)
    summed = torch.compile(_divergence) if how.compiled else _divergence
    total = logits_BTV.new_zeros((), dtype=torch.float32)
    for row, logits_TV in enumerate(logits_BTV):
        pieces = (x.split(_PIECE) for x in (logits_TV, teacher_NTV[row // rows], targets_BT[row]))
        for arguments in zip(*pieces, strict=True):
            total = total + checkpoint(summed, *arguments, how.weight, how.temperature, use_reentrant=False)
    return total / targets_BT.numel()


def _divergence(logits_TV: Tensor, teacher_TV: Tensor, targets_T: Tensor, weight: float, temperature: float) -> Tensor:
    """The loss of T tokens, added up."""
    log_TV, teacher_TV = ((x.float() / temperature).log_softmax(-1) for x in (logits_TV, teacher_TV))
    total: Tensor = weight * temperature**2 * F.kl_div(log_TV, teacher_TV, reduction="sum", log_target=True)
    if weight < 1:
        total = total + (1 - weight) * F.cross_entropy(logits_TV.float(), targets_T, reduction="sum")
    return total


def window_length(options: TrainConfig, context: int) -> int:
    if options.length is not None and options.length > context:
        raise UserError(f"train.length is {options.length} but the model's context is {context}; lower it")
    return options.length or context


def training_bytes(options: TrainConfig, model: Decoder, vector: Vector, teacher: int = 0) -> tuple[int, int]:
    """What training a model, perhaps of no weights yet, keeps for certain: its state; activations and logits.

    The state is 16 bytes per trained parameter: fp32 weight, gradient, AdamW's two moments. What is frozen is kept as
    it is, and so are, as they are computed in and on every device, as many parameters of a ``teacher``. Activations are
    of a microbatch at ``vector``, and what no backward pass can do without: the residual stream before attention and
    MLP, queries, keys, values and what attention makes of them, gate and up; or the residual stream between layers,
    where they are computed again. With a teacher, or frozen weights that serve as one, logits are the teacher's, the
    followers' and their gradient.
    """
    shape, layers = model.shape, model.shape.layers(vector)
    width = computed_in(options.precision, training_device()).itemsize
    tokens = _rows(options) * window_length(options, shape.max_position_embeddings)
    state = sum(x.numel() * (16 if x.requires_grad else x.element_size()) for x in model.parameters())
    follows = teacher or not all(x.requires_grad for x in model.parameters())
    logits = shape.vocab_size * (3 * width if follows else 4)
    queries = shape.num_attention_heads * shape.head_dim
    kept = [2 * (shape.hidden_size + queries + shape.intermediate_size) + one.kv_values_per_token for one in layers]
    activations = width * (shape.hidden_size * len(layers) if options.recompute else sum(kept))
    state //= SIZE if options.parallel == "fsdp" else 1
    return state + width * teacher, tokens * (logits + activations)


def _rows(options: TrainConfig) -> int:
    return max(1, options.batch // (options.accumulate * SIZE))


def check_training_memory(what: str, options: TrainConfig, model: Decoder, vector: Vector, teacher: int = 0) -> None:
    """Refuses a training that cannot fit into this machine, counting only what is certain: see `training_bytes`."""
    device = training_device()
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    state, activations = training_bytes(options, model, vector, teacher)
    if state + activations > total:
        raise UserError(
            f"training {what} takes at least {state / 2**30:.1f} GiB for weights and optimizer and "
            f"{activations / 2**30:.1f} for activations and logits of {_rows(options)} rows, but the {device.type} has "
            f"{total / 2**30:.1f}; lower train.batch or train.length, or take a smaller space or a larger machine"
        )


def text_loss(
    tokens: Tokens, options: TrainConfig, length: int, teacher: tuple[Decoder, Distillation] | None = None
) -> Loss:
    """The loss of a step of a plain model on windows of ``length`` tokens; the teacher is frozen."""
    losses = torch.compile(row_losses) if options.compile else row_losses

    def loss_at(model: nn.Module, step: int, microbatch: Microbatch) -> Tensor:
        device = next(model.parameters()).device
        own = microbatch.of(options.batch)
        windows = training_batch(tokens, options.seed, step, options.batch, length, own).to(device)
        with autocast(options.precision, device):
            if teacher is None:
                return losses(model(windows[:, :-1]), windows[:, 1:]).mean()
            followed, how = teacher
            with torch.no_grad():
                followed_BTV = followed(windows[:, :-1])
            return divergence(model(windows[:, :-1]), followed_BTV, windows[:, 1:], how)

    return loss_at


def supernet_loss(space: SearchSpace, tokens: Tokens, options: SupernetConfig, length: int) -> Loss:
    """The loss of a step of a supernet by its recipe; with `trainable=kv` all rows follow the largest vector."""
    losses = torch.compile(row_losses) if options.compile else row_losses
    how = Distillation(options.distilled_share, options.distillation_temperature, options.compile)

    def loss_at(model: nn.Module, step: int, microbatch: Microbatch) -> Tensor:
        plan, kv = step_plan(space, options, step), options.trainable == "kv"
        own, device = microbatch.of(len(plan)), next(model.parameters()).device
        windows = training_batch(tokens, options.seed, step, len(plan), length, own).to(device)
        texts = [text[1:] or text for text in plan[own]] if kv else plan[own]  # a sandwich begins with the largest
        rows = windows.repeat_interleave(len(texts[0]), dim=0)
        choices_BL = torch.tensor(space.choice_indices(itertools.chain.from_iterable(texts)), device=device)
        with autocast(options.precision, device):
            if kv:
                largest = torch.tensor(space.choice_indices([space.largest] * len(windows)), device=device)
                with torch.no_grad():
                    teacher = model(windows[:, :-1], largest)
                return divergence(model(rows[:, :-1], choices_BL), teacher, rows[:, 1:], how)
            logits, targets = model(rows[:, :-1], choices_BL), rows[:, 1:]
            if len(texts[0]) == 1:
                return losses(logits, targets).mean()
            return distilled_loss(logits, targets, len(texts[0]), how)

    return loss_at
