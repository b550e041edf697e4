"""Several processes that train one model: their ranks under torchrun, and a broadcast.

Only the first process (rank 0) writes files and prints; the others compute. Without torchrun there is one process, and
everything here does nothing.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

RANK, LOCAL_RANK, SIZE = (
    int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
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
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def broadcast(value: Any) -> Any:
    """The first process's ``value``, in every process; a point where all wait for each other."""
    if SIZE == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def leave(code: int) -> NoReturn:
    """Ends one of several processes at once, leaving out the interpreter's own clean-up.

    gloo's threads outlive their process group; one that frees a tensor while the interpreter shuts down aborts the
    process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
