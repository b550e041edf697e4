"""The exceptions for everything that the user can mend, and what stands behind an exception."""

from collections.abc import Iterator


class UserError(Exception):
    """What is wrong, where, and how to mend it, in one sentence; the command line prints it and exits with 1."""


class AlreadyFinishedError(UserError):
    """The run asked for is there, finished, with the same config: in a sweep that goes on, no mistake at all."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, newest first, each once: a chain of exceptions can be a ring."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
