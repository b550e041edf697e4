"""Where text comes from. A corpus yields documents and can say what it is without reading everything.

A new source is one class here (or anywhere) and one YAML in conf/data/ that names it.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import logging
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import pyarrow

from nas.errors import UserError

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TEXT, _PACKED = {".txt", ".jsonl"}, {".gz", ".xz", ".zst", ".bz2"}


class Document(NamedTuple):
    """A text and a key that names it for good: its split depends on the key alone."""

    key: str
    text: str


class Corpus(Protocol):
    """A source of documents."""

    def fingerprint(self) -> str:
        """Changes when the text changes; cheap compared with reading and tokenising it."""

    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order.

        Raises:
            UserError: A source is missing or cannot be read.
        """


@dataclass(frozen=True)
class StdlibCorpus:
    """The source of the running Python's standard library, without its tests."""

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents():
            digest.update(f"{document.key}\0{document.text}\0".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if not _SKIPPED & set(relative.parts):
                yield Document(relative.as_posix(), path.read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class TextCorpus:
    """The user's own files: .txt is one document a file, .jsonl one a line; .gz, .xz, .zst and .bz2 are unpacked.

    Attributes:
        path: A file, a folder (searched through) or a glob pattern.
        text_key: The key of a .jsonl line that holds its text.
    """

    path: str
    text_key: str = "text"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.text_key.encode())
        for path in self._files():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        for path in self._files():
            try:
                with _open(path) as stream:
                    if _kind(path) == ".jsonl":
                        for number, line in enumerate(stream, start=1):
                            if line.strip():
                                yield _document(self._json_text(path, number, line))
                    else:
                        yield _document(stream.read())
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it or leave it out") from None
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise UserError(f"{path} cannot be read ({error}); restore it or leave it out") from None

    def _files(self) -> list[Path]:
        path = Path(self.path)
        # Path.glob takes no absolute pattern
        named = glob.glob(self.path, recursive=True)  # noqa: PTH207
        candidates = path.rglob("*") if path.is_dir() else map(Path, named)
        files = sorted(file for file in candidates if file.is_file() and _kind(file) in _TEXT)
        if not files:
            raise UserError(f"data.path '{self.path}' has no .txt or .jsonl file (plain, .gz, .xz or .zst); check it")
        return files

    def _json_text(self, path: Path, number: int, line: str) -> str:
        try:
            text = json.loads(line)[self.text_key]
            text.encode()  # JSON can spell half a surrogate pair, which is no text
        except (ValueError, KeyError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            raise UserError(
                f"{path} line {number} is not a JSON object with a text '{self.text_key}'; fix it or set data.text_key"
            )
        return text


@dataclass(frozen=True)
class HubCorpus:
    """A Hugging Face dataset by streaming, up to a number of megabytes of text.

    Attributes:
        dataset: A hub name, or a local folder of the same form (parquet, JSON lines, text).
        config: The dataset's configuration, where it has several.
        split: Which split to read.
        revision: A commit, to pin the data: prepared tokens are kept although a branch moves on.
        text_key: The column that holds the text.
        max_mb: Stop after this many megabytes (10^6 bytes) of UTF-8 text.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_key: str = "text"
    max_mb: float = 50

    def __post_init__(self) -> None:
        if not isinstance(self.max_mb, int | float) or not self.max_mb > 0:
            raise UserError(f"data.max_mb is {self.max_mb!r}; give a number of megabytes above zero")

    def fingerprint(self) -> str:
        folder = Path(self.dataset)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr((self, stamps)).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        import datasets  # heavy, and only this source needs it

        for library in ("datasets", "huggingface_hub"):  # what they would log is in the sentence below
            logging.getLogger(library).setLevel(logging.CRITICAL)
        budget = self.max_mb * 1e6
        try:
            rows = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for row in rows:
                if self.text_key not in row:
                    raise UserError(
                        f"dataset {self.dataset} has no column '{self.text_key}' but {', '.join(row)}; "
                        "set data.text_key"
                    )
                if not isinstance(text := row[self.text_key], str):
                    raise UserError(
                        f"dataset {self.dataset} has {text!r:.40} in column '{self.text_key}', which is no text; set "
                        "data.text_key to another column"
                    )
                yield _document(text)
                budget -= len(text.encode())
                if budget <= 0:
                    return
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            problem = " ".join(str(error).split())
            raise UserError(f"dataset {self.dataset} cannot be read ({problem}); check data.*") from None


def _kind(path: Path) -> str:
    """The suffix of a file's text, leaving aside that of its packing."""
    return Path(path.stem).suffix if path.suffix in _PACKED else path.suffix


def _open(path: Path) -> IO[str]:
    """Opens a text file, unpacking it by its suffix."""
    if path.suffix == ".zst":  # pyarrow reads every frame and notices a file that was cut short
        return io.TextIOWrapper(pyarrow.input_stream(path, compression="zstd"), encoding="utf-8")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    stream: IO[str] = openers.get(path.suffix, io.open)(path, "rt", encoding="utf-8")
    return stream


def _document(text: str) -> Document:
    return Document(hashlib.sha256(text.encode()).hexdigest(), text)
