"""The tokenizer: a byte-level BPE trained on the corpus, or one that the user gives."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nas.errors import UserError
from nas.files import read_json, write_json

END_OF_TEXT = "<|endoftext|>"
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # ours and other tokenizers'
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
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


def tokenizer_file(reference: str) -> Path:
    path = Path(reference)
    return path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(reference: str) -> Tokenizer:
    """Loads a tokenizer.json, or the one in a Hugging Face model directory; a UserError if that is not possible."""
    file = tokenizer_file(reference)
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()  # transformers writes into the file what its last call asked for
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"tokenizer {file} cannot be read ({error}); give a tokenizer.json or a Hugging Face directory that has one"
        ) from None


def check_vocabulary(reference: str, own: Path) -> None:
    """Refuses a tokenizer in which tokens have other ids than in a trained model's ``own``; it may have more tokens."""
    given, learnt = (load_tokenizer(str(each)).get_vocab() for each in (reference, own))
    if not learnt.items() <= given.items():
        raise UserError(
            f"tokenizer {reference} has another vocabulary than that of the trained weights, {own}; leave tokenizer= "
            "out, or train from random weights"
        )


def document_frame(tokenizer: Tokenizer, file: Path) -> tuple[list[int], list[int]]:
    """The ids before and after every document of a training text.

    The tokenizer itself may put them there. Otherwise the beginning is the bos_token_id of the config.json beside its
    ``file``, unless a tokenizer_config.json says that none is added, and the end its eos_token_id, of several the
    first, or a token of a usual name. Where both are the same token, documents are only told apart by it.
    """
    plain, framed = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    at = next(at for at in range(len(framed) + 1) if framed[at : at + len(plain)] == plain)
    before, after = framed[:at], framed[at + len(plain) :]
    special, own = special_ids(file), json_beside(file, "tokenizer_config.json")
    if not before and (own is None or own.get("add_bos_token")):
        before = as_ids(special.get("bos_token_id"))[:1]
    if not after:
        after = as_ids(special.get("eos_token_id", end_of_text_id(tokenizer)))[:1]
    return ([] if before == after else before), after


def as_ids(stated: int | list[int] | None) -> list[int]:
    """Special ids as a list, of which configurations state none, one or several."""
    return stated if isinstance(stated, list) else [] if stated is None else [stated]


def chat_template(file: Path) -> str | None:
    """The chat template beside a tokenizer, if there is one."""
    beside = file.with_name("chat_template.jinja")
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = (json_beside(file, "tokenizer_config.json") or {}).get("chat_template")
    return template if isinstance(template, str) else None


def special_ids(file: Path) -> dict[str, Any]:
    """The ids of beginning, end and padding that the configuration beside a tokenizer states: one each, or several."""
    stated: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        config = json_beside(file, name) or {}
        for key in [key for key in SPECIAL_IDS if config.get(key, -1) not in (None, -1)]:  # -1: none, in early Llamas
            if not all(type(one) is int and one >= 0 for one in as_ids(config[key])):
                raise UserError(
                    f"{file.with_name(name)} has {key} {config[key]!r}; give a token id, a whole number of 0 or more, "
                    "or a list of those"
                )
            stated[key] = config[key]
    return stated


def special_or_usual_ids(file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `special_ids` finds beside a tokenizer's file; if nothing, the tokenizer's own beginning and end."""
    return special_ids(file) or {"bos_token_id": beginning_id(tokenizer), "eos_token_id": end_of_text_id(tokenizer)}


def copy_companions(file: Path, folder: Path, generation: Mapping[str, Any] | None = None) -> None:
    """Copies what lies beside a checkpoint's tokenizer and must not be lost: special tokens, chat template, generation.

    The generation_config.json then has all special ids, and what ``generation`` has beyond.
    """
    for name in COMPANIONS:
        if file.with_name(name).is_file():
            shutil.copy(file.with_name(name), folder)
    stated = special_ids(file) | (json_beside(file, "generation_config.json") or {})
    if found := {**(generation or {}), **stated}:
        write_json(folder / "generation_config.json", found)


def json_beside(file: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in the file of this name beside another file, if there is one."""
    beside = file.with_name(name)
    return read_json(beside) if beside.is_file() else None


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
