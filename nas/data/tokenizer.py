"""The tokenizer: a byte-level BPE trained on the corpus, or one that the user gives."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nas.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # ours and other tokenizers'
_TRAINING_CHARACTERS = 20_000_000  # a few megabytes are enough for the merges; more only costs time


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of exactly ``vocab_size`` entries, END_OF_TEXT among them, or raises a UserError."""

    def head() -> Iterable[str]:
        left = _TRAINING_CHARACTERS
        for text in texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(head(), trainer)
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        fix = "more text or a smaller space" if found < vocab_size else "a space with a larger vocabulary"
        raise UserError(
            f"the text yields a byte-level tokenizer of {found} tokens but the space's vocab_size is {vocab_size}; "
            f"give {fix}, or a tokenizer="
        )
    return tokenizer


def load_tokenizer(reference: str) -> Tokenizer:
    """Loads a tokenizer.json, or the one in a Hugging Face model directory; a UserError if that is not possible."""
    path = Path(reference)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"tokenizer {file} cannot be read ({error}); give a tokenizer.json or a Hugging Face directory that has one"
        ) from None


def beginning_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that begins a text: what the tokenizer itself puts there, a usual name, or the end of text."""
    if begun := tokenizer.encode("").ids:
        return int(begun[0])
    return _first_known(tokenizer, "<s>", "<|begin_of_text|>", "<bos>", *_ENDS)


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that ends a document, by the usual names."""
    return _first_known(tokenizer, *_ENDS)


def _first_known(tokenizer: Tokenizer, *names: str) -> int | None:
    return next((index for index in map(tokenizer.token_to_id, names) if index is not None), None)
