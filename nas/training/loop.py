"""The training loop: AdamW, warm-up and cosine, gradient clipping, checkpoints, exact resume, on one or many processes.

What a step computes is a function of its number, given by the caller: the loop knows nothing of vectors or text. All
randomness lives in that function and comes from a seed and the step, so a resumed run is the same run, and so is one
that goes on with another number of processes: what is saved is the full state dict in plain tensors.
"""

import math
import warnings
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from nas import console
from nas.config import TrainConfig
from nas.distributed import IS_MAIN, RANK, SIZE
from nas.errors import UserError, in_short
from nas.files import write_atomically
from nas.hardware import compile_layers
from nas.model import Supernet
from nas.model.decoder import Layer
from nas.run import Run

CHECKPOINT = "checkpoint.pt"
_FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


@dataclass(frozen=True)
class Microbatch:
    """The ``index``-th of ``count`` equal shares of a step's rows, over the processes and the microbatches of each."""

    index: int = 0
    count: int = 1

    def of(self, rows: int) -> slice:
        """Its rows, of ``rows``; a UserError if they cannot be shared out equally."""
        size, left = divmod(rows, self.count)
        if left or not size:
            raise UserError(
                f"the {rows} texts of a training step cannot be shared out equally over {SIZE} processes × "
                f"{self.count // SIZE} microbatches; change train.batch or train.accumulate"
            )
        return slice(self.index * size, (self.index + 1) * size)


Loss = Callable[[nn.Module, int, Microbatch], Tensor]
"""Mean training loss (nats per token, scalar) of a microbatch of a step: model, number of the step, microbatch."""


def training_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computed_in(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision name; ``auto`` is bf16 on a GPU and fp32 elsewhere."""
    reduced = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if reduced else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a precision name."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computed_in(precision, device) == torch.bfloat16)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to ``final_share`` of the peak at the last step."""
    warmup = max(1, round(config.warmup_share * config.steps))
    if step < warmup:
        return config.peak_learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    share = config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.peak_learning_rate * share


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model_state, optimizer_state = dcp.get_state_dict(model, optimizer, options=_FULL)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:  # a stream, so that a full disk is an OSError
            torch.save({"model": model_state, "optimizer": optimizer_state, "step": step}, stream)

    if IS_MAIN:
        write_atomically(path, write)


def _names(model_state: dict[str, Any], optimizer_state: dict[str, Any]) -> set[str]:
    """Of the weights and moments in state dicts."""
    moments = {f"{key} of {name}" for name, values in optimizer_state["state"].items() for key in values}
    return {*model_state, *moments}


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `_save` wrote, in every process, and returns the number of steps done."""
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch writes checksums but does not look at them
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        expected = dcp.get_state_dict(model, optimizer, options=dcp.StateDictOptions(ignore_frozen_params=True))
        if wrong := _names(*expected) ^ _names(content["model"], content["optimizer"]):
            raise ValueError(f"{min(wrong)} is missing or has no place in this training")
        states = {"model_state_dict": content["model"], "optim_state_dict": content["optimizer"]}
        options = dcp.StateDictOptions(full_state_dict=True, strict=False)  # the file has nothing that is frozen
        dcp.set_state_dict(model, optimizer, **states, options=options)
        return int(content["step"])
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(
            f"checkpoint {path} is corrupt ({in_short(error)}); remove it and run the same command to start this run "
            "over"
        ) from None


def make_ready(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Moves ``model`` to its device; returns what a training step calls: the model, or a wrapper that shares it out."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if config.compile:
        compile_layers(layers, "train.compile=false")
    for layer in layers if config.recompute else ():  # around what is compiled, or no layer would share its graph
        layer.forward = partial(recomputed, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
    if SIZE > 1 and config.parallel == "fsdp":
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        if isinstance(model, Supernet):
            register_fsdp_forward_method(model, "shared_losses")
        return model
    model.to(training_device())
    if SIZE == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that replaces this one is not in every PyTorch yet
        return DistributedDataParallel(model, broadcast_buffers=False)


def fit(
    model: nn.Module, loss_at: Loss, config: TrainConfig, run: Run, validate: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Trains ``model`` in place, going on from the run's checkpoint if it has one; returns the last validation.

    Logs ``step, loss_nats, learning_rate, gradient_norm`` every `log_every` steps and what ``validate`` (called under
    no_grad, in eval mode) returns every `validate_every` steps and at the end.

    Raises:
        UserError: The loss is no longer finite, the checkpoint is corrupt, or a step's rows cannot be shared out.
    """
    ready, optimizer = make_ready(model, config), make_optimizer(model, config)
    checkpoint = run.path / CHECKPOINT
    step = _load(checkpoint, model, optimizer) if checkpoint.is_file() else 0
    validated: dict[str, float] = {}
    pending: list[Tensor] = []  # losses and gradient norms not yet looked at: looking waits for the GPU
    with console.progress_bar("Training", config.steps, step) as bar:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            pending.append(training_step(ready, loss_at, step, optimizer, config))
            step += 1
            last = step == config.steps
            checkpoint_due = step % config.checkpoint_every == 0 and not last
            if step % config.log_every == 0 or checkpoint_due or last:
                loss, norm = _means(pending)
                pending.clear()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    last_good = f"the last good checkpoint is {checkpoint}"
                    kept = last_good if checkpoint.is_file() else "there is no checkpoint yet"
                    raise UserError(
                        f"the training loss is no longer finite within the {config.log_every} steps up to {step}; "
                        f"lower train.learning_rate (now {config.peak_learning_rate}) under a new name; {kept}"
                    )
                run.log(step=step, loss_nats=loss, gradient_norm=norm, learning_rate=learning_rate_at(step - 1, config))
                bar(step, f"loss {loss:.3f}")
            if step % config.validate_every == 0 or last:
                model.eval()
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # shapes differ: not worth a graph
                    validated = validate()
                model.train()
                run.log(step=step, **validated)
            if checkpoint_due:
                _save(checkpoint, model, optimizer, step)
    return validated


def _means(losses_and_norms: list[Tensor]) -> list[float]:
    """Of loss and gradient norm, over steps and processes."""
    means = torch.stack(losses_and_norms).double().mean(0)
    if SIZE > 1:
        dist.all_reduce(means)
    return (means / SIZE).tolist()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on what is not frozen; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.peak_learning_rate, betas=(0.9, 0.95), fused=True)


def gradients_kept_local(model: nn.Module, local: bool) -> AbstractContextManager[None]:
    """While the block runs, gradients are added up without a reduction over the processes, if ``local``."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not local)
    return model.no_sync() if local and isinstance(model, DistributedDataParallel) else nullcontext()


def training_step(
    model: nn.Module, loss_at: Loss, step: int, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> Tensor:
    """One step of the optimizer: this process's loss and the gradient norm, shape (2,)."""
    losses = []
    for number in range(config.accumulate):
        microbatch = Microbatch(RANK * config.accumulate + number, SIZE * config.accumulate)
        with gradients_kept_local(model, number + 1 < config.accumulate):
            loss = loss_at(model, step, microbatch) / config.accumulate
            loss.backward()
        losses.append(loss.detach())
    norm: Tensor = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((torch.stack(losses).sum(), norm.full_tensor() if isinstance(norm, DTensor) else norm))


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict without what is frozen, on the CPU of the first process; all must call it."""
    return dcp.get_model_state_dict(model, options=_FULL)  # type: ignore[return-value]
