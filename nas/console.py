"""What a person at a terminal sees: lines, tables, and progress bars, which appear on a terminal's stderr only.

Of several processes that work together only the first one prints, except what went wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from nas.distributed import IS_MAIN

_out = Console(soft_wrap=True, highlight=False, markup=False, quiet=not IS_MAIN)
if not _out.is_terminal:
    _out.width = max(_out.width, 160)  # in a pipe or a log tables need not be folded
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

print = _out.print  # a line or a rich renderable
warn = _err.print  # an error or a warning


def quiet() -> None:
    """Makes this process silent, except for what went wrong."""
    _out.quiet = True


class Bar:
    """A running progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, completed: float, note: str = "", total: float | None = None) -> None:
        """Set how much is done, a short note beside the bar (a loss, a vector), and the total if it has changed."""
        self._progress.update(self._task, completed=completed, total=total, note=note)


@contextmanager
def progress_bar(title: str, total: float | None, completed: float = 0) -> Iterator[Bar]:
    """A bar with the time left, unless the total is unknown; invisible when stderr is not a terminal."""
    disable = _out.quiet or not _err.is_terminal
    times = (TimeElapsedColumn(), "left", TimeRemainingColumn())
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), *times, "{task.fields[note]}")
    with Progress(*columns, console=_err, disable=disable, transient=True) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=int(completed), note=""))
