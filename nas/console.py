"""What a person at a terminal sees: lines, tables, and progress bars that say how long is left.

Progress goes to stderr and only to a terminal; in a pipe or a batch job nothing but the result lines appears. Of
several processes that work together only the first one speaks, except to say what went wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nas.distributed import IS_MAIN

_NO_TERMINAL = 160  # columns of a pipe or a log: tables need not be folded there
_out = Console(soft_wrap=True, highlight=False, markup=False, quiet=not IS_MAIN)
if not _out.is_terminal:
    _out.width = max(_out.width, _NO_TERMINAL)
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def print(message: object = "") -> None:
    """Print a line or a rich renderable to stdout."""
    _out.print(message)


def quiet() -> None:
    """Makes this process silent, except for what went wrong."""
    _out.quiet = True


def warn(message: str) -> None:
    """Print an error or a warning to stderr."""
    _err.print(message)


class Bar:
    """A running progress bar."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task  # progress.tasks is keyed by an int-like TaskID

    def update(self, completed: float, note: str = "", total: float | None = None) -> None:
        """Set how much is done, a short note beside the bar (a loss, a vector), and the total if it has changed."""
        self._progress.update(self._task, completed=completed, total=total, note=note)  # type: ignore[arg-type]


@contextmanager
def progress_bar(title: str, total: float | None, completed: float = 0) -> Iterator[Bar]:
    """A bar with the time left, unless the total is unknown; invisible when stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_err, disable=_out.quiet or not _err.is_terminal, transient=True) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=int(completed), note=""))
