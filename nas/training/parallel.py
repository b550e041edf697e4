"""A model made ready for training: on its device, compiled, shared out over processes.

What is saved is the full state dict in plain tensors, so that any number of processes can go on from it.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nas.config import TrainConfig
from nas.distributed import SIZE
from nas.hardware import check_compiler
from nas.model import Supernet
from nas.model.decoder import Layer

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def training_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_ready(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Moves ``model`` to its device; returns what a training step calls: the model, or a wrapper that shares it out."""
    if config.compile:
        check_compiler("train.compile=false")
    torch._dynamo.config.recompile_limit = 64  # a graph for each number of K/V heads, and there can be more than 8
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for layer in layers:
        if config.recompute:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
        if config.compile:  # one by one: all of one shape share a graph, which is compiled faster than the model
            layer.compile(fullgraph=True)
    if SIZE > 1 and config.parallel == "fsdp":
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        if isinstance(model, Supernet):
            register_fsdp_forward_method(model, "shared_forward")
        return model
    model.to(training_device())
    if SIZE == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that replaces this one is not in every PyTorch yet
        return DistributedDataParallel(model, broadcast_buffers=False)


def gradients_kept_local(model: nn.Module, local: bool) -> AbstractContextManager[None]:
    """While the block runs, gradients are added up without a reduction over the processes, if ``local``."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not local)
    return model.no_sync() if local and isinstance(model, DistributedDataParallel) else nullcontext()


def mean_over_processes(values: Tensor) -> Tensor:
    if SIZE > 1:
        dist.all_reduce(values)
    return values / SIZE


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict on the CPU in the first process, nothing in the others; all must call it."""
    return get_model_state_dict(model, options=FULL)  # type: ignore[return-value]
