"""Token ids of a corpus: read as a stream, split, tokenised once, kept on disk and memory-mapped from there.

Neither the text nor its tokens are ever in memory all at once. The folder's name is a hash of the text and of the
tokenizer. Documents go to training or validation by a hash of their key: the split is the same on every machine.
"""

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from nas import console
from nas.data.corpora import Corpus
from nas.data.tokenizer import document_frame, load_tokenizer, tokenizer_file, train_tokenizer
from nas.errors import UserError
from nas.files import file_hash, read_json, value_hash, write_atomically, write_json

_ONE_IN = 20  # documents that go to validation
_FEW = 2 * _ONE_IN  # with fewer documents, each gives its tail to validation instead
_PIECE = 100_000  # characters that are tokenised as one: long documents on all cores
_BATCH = 4_000_000  # characters that are tokenised together, and in memory at once
_NAMES = ("tokenizer.json", "train.npy", "validation.npy")
_MARK = "meta.json"  # written last

Tokens = npt.NDArray[np.uint32]
_Piece = tuple[int, str, bool, bool]  # 0 for training or 1 for validation, a piece of a text, is it the first, the last


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus: one long row of token ids each for training and validation, memory-mapped."""

    train: Tokens
    validation: Tokens
    tokenizer: Path  # a tokenizer.json
    digest: str  # of both rows and of the tokenizer: equal digests are equal data


def prepare_tokens(corpus: Corpus, tokenizer: str | None, vocab_size: int, cache: Path) -> TokenData:
    """The tokens of ``corpus``, from the folder ``cache`` where they are already there.

    ``tokenizer`` is a tokenizer.json or Hugging Face directory; None trains a byte-level BPE on the training split.
    ``vocab_size`` is of the model that will read the tokens. A UserError tells what is wrong with text or tokenizer.
    """
    given, frame = None, None
    if tokenizer:
        given = load_tokenizer(tokenizer)
        frame = document_frame(given, tokenizer_file(tokenizer))
        most = 1 + max([*given.get_vocab().values(), *frame[0], *frame[1]])
        if most > vocab_size:
            raise UserError(
                f"tokenizer {tokenizer} has {most} tokens but the model's vocab_size is {vocab_size}; "
                "give a smaller tokenizer or a space with a larger vocabulary"
            )
    recipe = [corpus.fingerprint(), given.to_str() if given else f"bpe {vocab_size}", _ONE_IN, frame]
    folder = cache / f"tokens-{value_hash(recipe)}"
    folder.mkdir(parents=True, exist_ok=True)
    saved, *rows = (folder / name for name in _NAMES)
    digest = _intact(folder)
    if not digest:
        with filelock.FileLock(folder / ".lock"):  # of several processes one tokenises, and the others wait
            digest = _intact(folder) or _tokenise(corpus, given, frame, vocab_size, folder)
    train, validation = (np.load(row, mmap_mode="r") for row in rows)
    return TokenData(train, validation, saved, digest)


def _intact(folder: Path) -> str | None:
    """The digest of the cache in a folder; None if there is no finished one, or if it has changed since."""
    with suppress(UserError, FileNotFoundError):
        recorded: str | None = read_json(folder / _MARK).get("digest")
        return recorded if recorded == _digest(folder) else None
    return None


def _digest(folder: Path) -> str:
    return hashlib.sha256("".join(file_hash(folder / name) for name in _NAMES).encode()).hexdigest()


def _tokenise(
    corpus: Corpus, given: Tokenizer | None, frame: tuple[list[int], list[int]] | None, vocab_size: int, folder: Path
) -> str:
    """Reads the corpus as a stream, at most twice: its head for the tokenizer, all of it for the tokens.

    Returns the cache's digest.
    """
    if (folder / _MARK).is_file():
        console.print(f"The tokens in {folder} are damaged and are made anew")
    console.print(f"Tokenising {type(corpus).__name__} into {folder}")
    model = given or train_tokenizer((train for train, _ in _splits(corpus)), vocab_size)
    saved, *rows = (folder / name for name in _NAMES)
    for file in rows:
        file.unlink(missing_ok=True)  # and not overwritten: another process may have mapped a damaged one
    write_atomically(saved, lambda path: model.save(str(path)))
    opening, closing = frame or document_frame(model, saved)
    totals, characters = [0, 0], 0
    with rows[0].open("wb") as train, rows[1].open("wb") as validation:
        streams = (train, validation)
        for stream in streams:
            _write_header(stream, 0)
        with console.progress_bar("Tokenising (MB of text)", None) as bar:
            for batch in _batches(_pieces(corpus)):
                encodings = model.encode_batch_fast([text for _, text, *_ in batch], add_special_tokens=False)
                for (index, text, is_first, is_last), encoding in zip(batch, encodings, strict=True):
                    ids = (opening if is_first else []) + encoding.ids + (closing if is_last else [])
                    row = np.array(ids, dtype=np.uint32)
                    totals[index] += len(row)
                    streams[index].write(row.tobytes())
                    characters += len(text)
                bar(characters / 1e6)
        for stream, total in zip(streams, totals, strict=True):
            _write_header(stream, total)
    if min(totals) < 2:
        raise UserError(
            f"the corpus leaves {totals[0]} tokens for training and {totals[1]} for validation; give more text"
        )
    digest = _digest(folder)
    write_json(folder / _MARK, {"digest": digest})
    return digest


def _splits(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """What of each document goes to training, and what to validation: all to one, or of few documents their tails."""
    documents = (document for document in corpus.documents() if document.text.strip())
    first = list(itertools.islice(documents, _FEW))
    if not first:
        raise UserError(f"{corpus} holds no text; check data.*")
    for key, text in itertools.chain(first, documents):
        if len(first) < _FEW:
            cut = len(text) - len(text) // _ONE_IN
        else:
            cut = len(text) if int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % _ONE_IN else 0
        yield text[:cut], text[cut:]


def _pieces(corpus: Corpus) -> Iterator[_Piece]:
    for split in _splits(corpus):
        for index, text in enumerate(split):
            for at in range(0, len(text), _PIECE):
                yield index, text[at : at + _PIECE], at == 0, at + _PIECE >= len(text)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that are tokenised together, on all cores, in little memory."""
    batch, characters = list[_Piece](), 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    yield batch


def _write_header(stream: BinaryIO, tokens: int) -> None:
    """Begins a .npy file, or says at its beginning how long it became: the header leaves room for that."""
    stream.seek(0)
    np.lib.format.write_array_header_1_0(stream, {"descr": "<u4", "fortran_order": False, "shape": (tokens,)})
