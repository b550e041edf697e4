"""The exceptions for what the user can fix, and what their sentences say of others."""

import re
from collections.abc import Iterator

_OUT_OF_MEMORY = re.compile(r"out of memory|can(not|'t) allocate memory|ALLOC_FAILED", re.IGNORECASE)


class UserError(Exception):
    """What is wrong, where, and how to fix it, in one sentence; the command line prints it and exits with 1."""


class AlreadyFinishedError(UserError):
    """The run asked for is there, finished, with the same config: in a sweep that goes on, no mistake at all."""


class InUseError(UserError):
    """Another process is writing the run directory at this moment."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that led to it, newest first, each once: a chain of exceptions can be a ring."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def in_short(error: BaseException) -> str:
    """The first two lines of an error's message as one, or its name if it says nothing."""
    return " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of its GPU: PyTorch has an exception of its own for the GPU alone."""
    return any(
        isinstance(cause, MemoryError)
        or type(cause).__name__ == "OutOfMemoryError"
        or (isinstance(cause, RuntimeError | OSError) and _OUT_OF_MEMORY.search(str(cause)))
        for cause in causes(error)
    )


def without_passwords(text: str) -> str:
    """The text with ``***`` for the password of every URL in it."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&]\w*password=)[^&\s]*", r"\1***", text)
