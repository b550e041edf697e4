"""More processes on this machine for one search: started with it, silent, and gone when it is.

Each works on the same study, which sees to it that they never get in each other's way. None writes the run directory.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

import torch

from nas import console
from nas.errors import UserError

_GRACE_S = 5.0  # for workers to see by themselves that all is done


@contextmanager
def more_workers(work: Callable[[], None], count: int) -> Iterator[None]:
    """Runs ``work``, which must be picklable, in ``count - 1`` more processes for as long as the block runs."""
    threads, context = torch.get_num_threads(), multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(work, index, count)) for index in range(1, count)]
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a Ctrl-C is for this process to handle
    try:
        for process in processes:
            process.start()
    finally:
        signal.signal(signal.SIGINT, previous)
    try:
        _take_share(0, count)
        yield
        for process in processes:
            process.join(_GRACE_S)
    finally:
        torch.set_num_threads(threads)
        for index, process in enumerate(processes, start=1):
            if process.exitcode is not None and process.exitcode < 0:
                killed = signal.Signals(-process.exitcode).name
                console.warn(f"worker {index} was killed ({killed}); the others did its share")
            process.terminate()
            process.join()


def _run(work: Callable[[], None], index: int, count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    console.out.quiet = True
    _take_share(index, count)
    try:
        work()
    except (UserError, OSError) as error:
        console.warn(f"worker {index} ended early: {error}")
        sys.exit(1)


def _take_share(index: int, count: int) -> None:
    """Its part of the processor's cores, and a GPU of its own as far as there are enough."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if count > 1 and torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())


def _end_with_parent() -> None:
    """Does not let this process outlive its parent, however that dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
