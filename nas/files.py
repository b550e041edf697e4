"""Files that never look finished when they are not: written beside their name and renamed; and hashes of content."""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nas.errors import UserError, causes


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path beside ``path`` and renames the result into place.

    An OSError, such as a full disk, names ``path``, whatever library did the writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors lets nobody else read
        write(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    except Exception as error:
        for cause in causes(error):  # libraries wrap the system's error in errors of their own
            if isinstance(cause, OSError):
                number = cause.errno or errno.ENOSPC  # NumPy gives no number when a write stops short
            elif match := re.search(r"\(os error (\d+)\)", str(cause)):  # tokenizers and safetensors
                number = int(match[1])
            else:
                continue
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def append_json_lines(file: Path, values: Iterable[object]) -> None:
    """Adds a line for each value, none of them to a line that a kill cut short."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        stream.seek(max(0, stream.tell() - 1))
        cut_short = stream.read() not in (b"", b"\n")
        stream.write(b"\n" if cut_short else b"")
        stream.writelines(json.dumps(value).encode() + b"\n" for value in values)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a UserError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it or run its stage again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; restore it or run its stage again")
    return value


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, partial(frame.to_csv, index=False))


def read_csv(path: Path, columns: list[str], positive: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV that must have at least ``columns``, with numbers above zero in the ``positive`` ones; else a UserError."""
    try:
        frame = pd.read_csv(path, dtype={"vector": str})  # "4" is a vector of one layer
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a valid CSV ({reason}); restore it or run its stage again") from None
    if missing := [column for column in columns if column not in frame.columns]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; restore it or run its stage again")
    values = numbers(frame, positive)
    require(path, frame, ((values > 0) & (values < math.inf)).all(axis=1), "its numbers must be positive")
    return frame


def numbers(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Some columns as numbers, NaN where they hold anything else."""
    found: pd.DataFrame = frame[list(columns)].apply(pd.to_numeric, errors="coerce")
    return found


def require(path: Path, frame: pd.DataFrame, good: "pd.Series[bool]", rule: str) -> None:
    """Refuses a table for its first row that is not good, with the row's line in the file."""
    if not good.all():
        raise UserError(f"{path} is corrupt (row {frame.index[~good][0] + 2}: {rule}); restore it or measure again")


def file_hash(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def value_hash(value: object, length: int = 10) -> str:
    """A short stable hash of plain values, for names and cache keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]
