"""What a person at a terminal sees: lines, tables, and progress bars, which appear on a terminal's stderr only.

Of several processes that work together only the first one prints, except what went wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from nas.distributed import IS_MAIN

out = Console(soft_wrap=True, highlight=False, markup=False, quiet=not IS_MAIN)
if not out.is_terminal:
    out.width = max(out.width, 160)  # in a pipe or a log tables need not be folded
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


class Bar(Protocol):
    """Sets how much is done, a note beside the bar, and the total if it has changed."""

    def __call__(self, done: float, note: str = "", total: float | None = None) -> None: ...


print = out.print  # a line or a rich renderable
warn = _err.print  # an error or a warning


@contextmanager
def progress_bar(title: str, total: float | None, completed: float = 0) -> Iterator[Bar]:
    """A bar with the time left, unless the total is unknown; invisible when stderr is not a terminal."""
    disable = out.quiet or not _err.is_terminal
    times = (TimeElapsedColumn(), "left", TimeRemainingColumn())
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), *times, "{task.fields[note]}")
    with Progress(*columns, console=_err, disable=disable, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=int(completed), note="")
        yield lambda done, note="", total=None: progress.update(task, completed=done, note=note, total=total)
