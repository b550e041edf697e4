"""Several processes that train one model under torchrun: only the first (rank 0) writes files and prints.

Without torchrun there is one process, and everything here does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
IS_MAIN = RANK == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, for as long as the block runs."""
    if SIZE == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def broadcast(value: Any) -> Any:
    """The first process's ``value``, in every process; a point where all wait for each other."""
    values = [value]
    if SIZE > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(values)
    return values[0]
