"""Files that never look finished when they are not: written beside their name and renamed; and hashes of content."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        if (number := _system_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _system_error(error: BaseException) -> int | None:
    """The operating system's number of an error while writing, which libraries wrap in errors of their own."""
    for cause in causes(error):
        if isinstance(cause, OSError):
            return cause.errno or errno.ENOSPC  # NumPy gives no number when a write stops short
        if match := re.search(r"\(os error (\d+)\)", str(cause)):  # tokenizers and safetensors
            return int(match[1])
    return None


def end_cut_line(file: Path) -> None:
    """Closes a line that a kill cut short, so that the next one does not continue it."""
    if file.is_file() and file.stat().st_size:
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                stream.write(b"\n")


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a UserError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it or run its stage again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; restore it or run its stage again")
    return value


def file_hash(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def value_hash(value: object, length: int = 10) -> str:
    """A short stable hash of plain values, for names and cache keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


def without_passwords(text: str) -> str:
    """The text with ``***`` for the password of every URL in it."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&]\w*password=)[^&\s]*", r"\1***", text)
