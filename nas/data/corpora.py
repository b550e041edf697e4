"""Where text comes from. A corpus yields documents and can tell whether they changed without tokenising them.

A new source is one class here (or anywhere) and one YAML in conf/data/ that names it.
"""

import glob
import hashlib
import json
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import pyarrow
from fsspec.compression import register_compression
from fsspec.implementations.local import LocalFileSystem

from nas import console
from nas.errors import UserError, in_short
from nas.files import file_hash, value_hash

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TEXT_FILE = re.compile(r"(\.txt|\.jsonl)(\.(gz|xz|zst|bz2))?$", re.IGNORECASE)
_HUB_RETRIES = 5  # of datasets; each stands for six requests within half a minute


class Document(NamedTuple):
    key: str  # names the text for good: its split depends on the key alone
    text: str


class Corpus(Protocol):
    def fingerprint(self) -> str:
        """Changes when the text changes; cheap compared with reading and tokenising it."""

    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order; a UserError where one is missing or cannot be read."""


@dataclass(frozen=True)
class StdlibCorpus:
    """The source of the running Python's standard library, without its tests."""

    def fingerprint(self) -> str:
        return value_hash(list(self.documents()))

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if not _SKIPPED & set(relative.parts):
                yield Document(relative.as_posix(), path.read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class TextCorpus:
    """The user's own files, plain or compressed: a .txt file is one document, a line of a .jsonl file is one.

    `datasets` does not read them: its JSON reader turns dates into times and numbers into text, refuses files whose
    other keys differ, and cannot name the line at fault.
    """

    path: str  # a file, a folder (searched through) or a glob pattern
    text_key: str = "text"  # of a .jsonl line

    def fingerprint(self) -> str:
        return value_hash([self.text_key, *map(file_hash, self._files())])

    def documents(self) -> Iterator[Document]:
        _read_zstd_to_its_end()
        for path in self._files():
            with (
                _readable(str(path), "restore it, convert it to UTF-8, or leave it out"),
                LocalFileSystem().open(path, "rt", compression="infer", encoding="utf-8-sig") as lines,
            ):
                if _TEXT_FILE.sub(r"\1", path.name).lower().endswith(".txt"):  # leaving aside its compression
                    yield _document(lines.read())
                    continue
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield self._of_json(line, f"{path} line {number}")

    def _files(self) -> list[Path]:
        if not self.path:
            raise UserError("data.path is empty; give a file or a folder")
        named = Path(_expanded(self.path))
        candidates: Iterable[Path] = named.rglob("*") if named.is_dir() else [named]
        if not named.exists():  # Path.glob takes no absolute pattern
            candidates = map(Path, glob.glob(str(named), recursive=True))  # noqa: PTH207
        files = sorted(file for file in candidates if file.is_file() and _TEXT_FILE.search(file.name))
        if not files:
            lack = "has no .txt or .jsonl file (plain or compressed)" if named.exists() else "does not exist"
            raise UserError(f"data.path '{self.path}' {lack}; check it")
        return files

    def _of_json(self, line: str, where: str) -> Document:
        try:
            return _document(json.loads(line)[self.text_key])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            wrong = f"{where} is not a JSON object with a text '{self.text_key}'"
            raise UserError(f"{wrong}; fix it or set data.text_key") from None


@dataclass(frozen=True)
class HubCorpus:
    """A Hugging Face dataset by streaming, up to a number of megabytes of text."""

    dataset: str  # a hub name, or a local folder of the same form (parquet, JSON lines, text)
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # a commit, to pin the data: prepared tokens are kept although a branch moves on
    text_key: str = "text"
    max_mb: float = 50  # stop after so many times 10^6 bytes of UTF-8 text

    def __post_init__(self) -> None:
        if not isinstance(self.max_mb, int | float) or not self.max_mb > 0:
            raise UserError(f"data.max_mb is {self.max_mb!r}; give a number of megabytes above zero")

    def fingerprint(self) -> str:
        files = sorted(path for path in Path(_expanded(self.dataset)).rglob("*") if path.is_file())
        return value_hash([repr(self), *((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)])

    def documents(self) -> Iterator[Document]:
        import datasets  # heavy, and only this source needs it

        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).handlers = [_RetryHandler(logging.WARNING)]
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = _HUB_RETRIES
        _read_zstd_to_its_end()
        left, name = self.max_mb * 1e6, _expanded(self.dataset)
        if Path(name).is_dir() and glob.has_magic(folder := str(Path(name).resolve())):
            raise UserError(
                f"dataset {folder} has a * ? or [ in its path, which `datasets` takes for a pattern; rename it"
            )
        with _readable(f"dataset {self.dataset}", "check data.* and the dataset's files"):
            rows = datasets.load_dataset(name, self.config, split=self.split, revision=self.revision, streaming=True)
            for row in rows:
                if not isinstance(text := row.get(self.text_key), str):
                    raise UserError(
                        f"dataset {self.dataset} has no text in column '{self.text_key}' but {text!r:.40}; set "
                        f"data.text_key to another of its columns: {', '.join(row)}"
                    )
                yield _document(text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))  # a byte order mark
                left -= len(text.encode())
                if left <= 0:
                    return


class _RetryHandler(logging.Handler):
    """Prints, of all that a library logs, that it tries again: everything else is in the error that it raises."""

    def emit(self, record: logging.LogRecord) -> None:
        if "Retrying" in (message := record.getMessage()):
            console.print(f"  the hub does not answer or broke off: {message}")


@contextmanager
def _readable(what: str, fix: str) -> Iterator[None]:
    """Turns an error in reading into a sentence; damaged files and networks fail in as many ways as there are bytes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read ({in_short(error)}); {fix}") from None


def _read_zstd_to_its_end() -> None:
    """Lets `fsspec`, and so `datasets`, read .zst by PyArrow, which notices where a stream breaks off."""

    def decompress(file: BinaryIO, mode: str = "rb") -> pyarrow.CompressedInputStream:
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode[0]), "zstd")

    register_compression("zstd", decompress, "zst", force=True)


def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 (Path's raises an error for an unknown user)


def _document(text: str) -> Document:
    return Document(hashlib.sha256(text.encode()).hexdigest(), text)
