"""Token ids of a corpus: split, tokenised once, kept on disk and memory-mapped from there.

The cache folder's name is a hash of the text and of the tokenizer, so a changed corpus is never mistaken for the old
one. Documents go to training or validation by a hash of their key: the split is the same on every machine.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from nas.console import say
from nas.data.corpora import Corpus, Document
from nas.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from nas.errors import UserError
from nas.files import file_hash, read_json, value_hash, write_atomically, write_json

_ONE_IN = 20  # documents that go to validation
_FEW = 2 * _ONE_IN  # with fewer documents, each gives its tail to validation instead
_PIECE = 100_000  # characters that are tokenised at once: long documents in parallel, and in little memory

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus.

    Attributes:
        train: Token ids of the training text, one long row, memory-mapped.
        validation: Token ids of the validation text.
        tokenizer: The tokenizer's tokenizer.json.
        digest: Hash of both rows and of the tokenizer: equal digests are equal data.
    """

    train: Tokens
    validation: Tokens
    tokenizer: Path
    digest: str


def prepare_tokens(corpus: Corpus, tokenizer: str | None, vocab_size: int, cache: Path) -> TokenData:
    """Returns the tokens of ``corpus``, from ``cache`` where they are already there.

    Args:
        corpus: The text.
        tokenizer: A tokenizer.json or Hugging Face directory; None trains a byte-level BPE on the training split.
        vocab_size: Vocabulary of the model that will read the tokens.
        cache: Folder of all caches.

    Raises:
        UserError: The text is empty or unreadable, or the tokenizer does not fit the vocabulary.
    """
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given and given.get_vocab_size() > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer} has {given.get_vocab_size()} tokens but the model's vocab_size is {vocab_size}; "
            "give a smaller tokenizer or a space with a larger vocabulary"
        )
    recipe = [corpus.fingerprint(), given.to_str() if given else f"bpe {vocab_size}", _ONE_IN]
    folder = cache / f"tokens-{value_hash(recipe)}"
    if not (folder / "meta.json").is_file():
        _tokenise(corpus, given, vocab_size, folder)
    try:
        return TokenData(
            train=np.load(folder / "train.npy", mmap_mode="r"),
            validation=np.load(folder / "validation.npy", mmap_mode="r"),
            tokenizer=folder / "tokenizer.json",
            digest=read_json(folder / "meta.json")["digest"],
        )
    except (ValueError, EOFError, KeyError, FileNotFoundError) as error:
        raise UserError(f"the tokens in {folder} are corrupt ({error}); remove that folder") from None


def _tokenise(corpus: Corpus, given: Tokenizer | None, vocab_size: int, folder: Path) -> None:
    say(f"Tokenising {type(corpus).__name__} into {folder}")
    documents = list(corpus.documents())  # read once: a streamed corpus is downloaded
    if not any(document.text.strip() for document in documents):
        raise UserError(f"{corpus} holds no text; check data.*")
    model = given or train_tokenizer(_split(documents, "train"), vocab_size)
    tokenizer_file = folder / "tokenizer.json"
    write_atomically(tokenizer_file, lambda path: model.save(str(path)))
    digest = hashlib.sha256(file_hash(tokenizer_file).encode())
    for name in ("train", "validation"):
        tokens = _encode(model, _split(documents, name))
        if len(tokens) < 2:
            raise UserError(f"the corpus leaves no text for {name}; give more text")
        write_atomically(folder / f"{name}.npy", partial(_save, tokens))
        digest.update(file_hash(folder / f"{name}.npy").encode())
    write_json(folder / "meta.json", {"digest": digest.hexdigest()})


def _split(documents: Sequence[Document], name: str) -> Iterator[str]:
    """The texts of one split: whole documents by key, or of few documents the last 1 / _ONE_IN of each."""
    few = len(documents) < _FEW
    for key, text in documents:
        if few:
            cut = len(text) - len(text) // _ONE_IN
            yield text[:cut] if name == "train" else text[cut:]
        elif (int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % _ONE_IN == 0) == (name == "validation"):
            yield text


def _encode(tokenizer: Tokenizer, texts: Iterator[str]) -> Tokens:
    """Token ids of all texts, each closed by the tokenizer's end of text (if it has one)."""
    end = end_of_text_id(tokenizer)
    closing = np.array([] if end is None else [end], dtype=np.uint32)
    chunks = [np.empty(0, np.uint32)]
    while batch := list(itertools.islice(texts, 64)):
        pieces = [[text[at : at + _PIECE] for at in range(0, len(text), _PIECE)] for text in batch]
        encodings = iter(tokenizer.encode_batch_fast(list(itertools.chain(*pieces)), add_special_tokens=False))
        for document in pieces:
            chunks += [np.array(next(encodings).ids, dtype=np.uint32) for _ in document]
            chunks.append(closing)
    return np.concatenate(chunks)


def _save(tokens: Tokens, path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, tokens)
