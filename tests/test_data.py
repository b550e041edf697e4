"""Text in, seeded batches out: corpora, tokenizer, splits, the cache on disk, and batches."""

import bz2
import codecs
import gzip
import json
import logging
import lzma
import os
import random
import re
import shutil
import string
import sysconfig
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from nas.data import TokenData, prepare_tokens, training_batch, validation_windows
from nas.data.corpora import Corpus, Document, HubCorpus, StdlibCorpus, TextCorpus
from nas.data.tokenizer import END_OF_TEXT, document_frame, end_of_text_id, load_tokenizer, special_ids, train_tokenizer
from nas.data.tokens import Tokens
from nas.errors import UserError
from tests.helpers import Damage, flipped, harm, to

VOCABULARY = 300
WORDS = ["the tokenizer", "größer als", "def run(self):", "日本語のテキスト", "🙂 and 🙃", "a\ttab\r\n", "  spaces  "]


def write_documents(count: int, seed: int = 0) -> list[str]:
    """Different documents, each long enough that its last twentieth is more than a few tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choice([*WORDS, *string.ascii_letters]) for _ in range(200)) for _ in range(count)]


@dataclass(frozen=True)
class ListCorpus:
    """Documents from memory, each under a key of its own."""

    keyed: tuple[tuple[str, str], ...]

    def fingerprint(self) -> str:
        """All of it."""
        return repr(self.keyed)

    def documents(self) -> Iterator[Document]:
        """In the order given."""
        return (Document(key, text) for key, text in self.keyed)


def numbered(texts: list[str]) -> ListCorpus:
    """A corpus whose keys are its documents' numbers."""
    return ListCorpus(tuple((str(number), text) for number, text in enumerate(texts)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small byte-level tokenizer."""
    return train_tokenizer(write_documents(20), VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, on disk."""
    path = tmp_path_factory.mktemp("tokenizer") / "mine.json"
    tokenizer.save(str(path))
    return path


def texts_of(tokens: Tokens, file: Path) -> list[str]:
    """The documents that a row of tokens was made of."""
    tokenizer = load_tokenizer(str(file))
    end = end_of_text_id(tokenizer)
    ends = np.flatnonzero(tokens == end)
    return [tokenizer.decode(row[row != end].tolist()) for row in np.split(tokens, ends + 1)[:-1]]


def split(data: TokenData) -> tuple[list[str], list[str]]:
    """The texts that went to training, and those that went to validation."""
    return texts_of(data.train, data.tokenizer), texts_of(data.validation, data.tokenizer)


def test_the_standard_library_is_read_without_tests_and_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(StdlibCorpus().documents())
    assert first.text == (Path(sysconfig.get_path("stdlib")) / first.key).read_text()
    kept = ["argparse.py", "json/decoder.py"]
    left_out = ["json/notes.txt", "test/a.py", "json/tests/a.py", "idlelib/idle_test/a.py", "site-packages/numpy/a.py"]
    for name in [*kept, *left_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert list(StdlibCorpus().documents()) == [(name, name) for name in kept]
    before = StdlibCorpus().fingerprint()
    (tmp_path / "test/a.py").write_text("more")
    assert StdlibCorpus().fingerprint() == before
    (tmp_path / "argparse.py").write_text("more")
    assert StdlibCorpus().fingerprint() != before


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
}


def texts_in(corpus: Corpus) -> list[str]:
    """The texts of a corpus."""
    return [document.text for document in corpus.documents()]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_json_lines_give_the_same_documents_as_text_files(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSIONS[suffix]
    texts = [text.replace("\r\n", "\n") for text in write_documents(3)]
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt{suffix}").write_bytes(compress(text.encode()))
    lines = "\n\n".join(json.dumps({"text": text, "id": 1}) for text in texts)
    (tmp_path / f"t.jsonl{suffix}").write_bytes(compress(lines.encode()))
    files, rows = TextCorpus(str(tmp_path / "text")), TextCorpus(str(tmp_path / f"t.jsonl{suffix}"))
    assert list(rows.documents()) == list(files.documents())
    assert texts_in(rows) == texts


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_file_compressed_in_several_pieces_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t.txt{suffix}"
    file.write_bytes(COMPRESSIONS[suffix](b"first half, ") + COMPRESSIONS[suffix](b"second half"))
    assert texts_in(TextCorpus(str(file))) == ["first half, second half"]


@pytest.mark.parametrize("name", ["t.txt", "T.TXT", "t.txt.gz", "T.TXT.GZ", "t.jsonl", "t.JSONL.Zst", "t.v2.jsonl"])
def test_a_byte_order_mark_is_dropped_and_endings_can_be_in_any_case(tmp_path: Path, name: str) -> None:
    content = '{"text": "größer"}\n{"text": "als"}\n' if "jsonl" in name.lower() else "größer"
    suffix = Path(name.lower()).suffix
    data = codecs.BOM_UTF8 + content.encode()
    (tmp_path / name).write_bytes(COMPRESSIONS[suffix if suffix in COMPRESSIONS else ""](data))
    assert texts_in(TextCorpus(str(tmp_path)))[0] == "größer"


def test_another_key_of_json_lines_can_hold_the_text_and_other_keys_can_differ(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": 1, "body": "2020-01-01"}\n{"body": "yes", "more": {"a": []}}\n{"body": "3", "more": 4}\n')
    assert texts_in(TextCorpus(str(file), text_key="body")) == ["2020-01-01", "yes", "3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with text at two levels, with a file that is no text, and with names that are patterns, too."""
    folder = tmp_path / "folder"
    names = ("b.txt", "a.txt", "deep/c.txt", "notes.md", "a.txt.md5", "[data]/d.txt", "e[1]*?.txt")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", ["[data]/d.txt", "a.txt", "b.txt", "deep/c.txt", "e[1]*?.txt"]),
        ("*.txt", ["a.txt", "b.txt", "e[1]*?.txt"]),
        ("**/?.txt", ["[data]/d.txt", "a.txt", "b.txt", "deep/c.txt"]),
        ("[ac].txt", ["a.txt"]),
        ("deep", ["deep/c.txt"]),
        ("b.txt", ["b.txt"]),
        ("[data]", ["[data]/d.txt"]),
        ("[data]/d.txt", ["[data]/d.txt"]),
        ("e[1]*?.txt", ["e[1]*?.txt"]),
    ],
)
def test_a_path_can_be_a_file_a_folder_or_a_pattern(
    folder: Path, path: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    for start in (str(folder), "~/folder"):
        assert texts_in(TextCorpus(f"{start}/{path}")) == [f"text of {name}" for name in names]


def test_the_fingerprint_of_text_follows_its_content(folder: Path) -> None:
    corpus = TextCorpus(str(folder))
    before = corpus.fingerprint()
    os.utime(folder / "a.txt", (1, 1))
    assert corpus.fingerprint() == before
    (folder / "a.txt").write_text("text of b.txt")
    assert corpus.fingerprint() != before


def test_no_path_is_not_the_working_directory() -> None:
    with pytest.raises(UserError, match=r"data\.path is empty; give a file or a folder"):
        texts_in(TextCorpus(""))


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/", "empty", "*.text", "notes.md", "t.txt.zip", "~nobody/x"])
def test_a_path_without_text_is_refused(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("notes.md", "t.txt.zip"):
        Path(name).write_text("text")
    lack = r"has no \.txt or \.jsonl file .*" if Path(path).exists() else "does not exist"
    with pytest.raises(UserError, match=rf"'{re.escape(path)}' {lack}; check it"):
        texts_in(TextCorpus(path))


@pytest.mark.parametrize(
    "line", ['{"words": "b"}', "not JSON", '["text"]', '{"text": 3}', '{"text": "\\ud800"}', "3", "[" * 100_000]
)
def test_a_line_that_holds_no_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"t\.jsonl line 3 is not a JSON object with a text 'text'.*data\.text_key"):
        texts_in(TextCorpus(str(tmp_path)))


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"caf\xe9 " * 1000)
    with pytest.raises(UserError, match=r"t\.txt cannot be read .*convert it to UTF-8"):
        texts_in(TextCorpus(str(tmp_path)))


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSIONS if suffix])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("source", [TextCorpus, HubCorpus])
def test_a_stream_that_breaks_off_or_was_never_compressed_is_refused(
    tmp_path: Path, suffix: str, kind: str, source: type[TextCorpus | HubCorpus]
) -> None:
    rows = [json.dumps({"text": text}) for text in write_documents(100)]
    whole = COMPRESSIONS[suffix]("\n".join(rows).encode())
    for content in (whole[: len(whole) // 2], whole[:-4], whole[:40], b"never compressed"):
        (tmp_path / f"t{kind}{suffix}").write_bytes(content)
        if source is HubCorpus and not content.startswith(whole[:4]):
            continue  # to datasets, what does not begin like compressed text is text
        with pytest.raises(UserError, match=rf"{tmp_path.name}.* cannot be read \(.+\); "):
            texts_in(source(str(tmp_path)))


@pytest.fixture(params=["jsonl", "parquet"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A local folder in the form of a Hugging Face dataset: ten documents of 100 000 bytes."""
    rows = pd.DataFrame({"text": [str(number) * 100_000 for number in range(10)], "id": range(10)})
    folder = tmp_path / "dataset"
    folder.mkdir()
    if request.param == "jsonl":
        rows.to_json(folder / "train.jsonl", orient="records", lines=True)
    else:
        rows.to_parquet(folder / "train.parquet")
    return folder


def test_a_dataset_is_read_in_its_order_up_to_a_number_of_megabytes(dataset: Path) -> None:
    documents = list(HubCorpus(str(dataset)).documents())
    assert [document.text for document in documents] == [str(number) * 100_000 for number in range(10)]
    assert len({document.key for document in documents}) == 10
    assert list(HubCorpus(str(dataset), max_mb=0.3).documents()) == documents[:3]  # a key is the same under any limit


def test_the_fingerprint_of_a_local_dataset_follows_its_files(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(dataset.parent))
    corpus = HubCorpus("~/dataset")
    before = corpus.fingerprint()
    assert corpus.fingerprint() == before
    shutil.copy(next(dataset.iterdir()), dataset / "more.txt")
    assert corpus.fingerprint() != before


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.jsonl", '{"words": "a"}\n', {}, r"no text in column 'text' but None; set data\.text_key .*: words"),
        ("a.jsonl", '{"text": 3}\n', {}, r"no text in column 'text' but 3; set data\.text_key"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', {}, r"no text in column 'text' but None"),
        ("a.jsonl", '{"text": "a"}\n', {"split": "test"}, r"cannot be read \(.*test.*\); check data\.\*"),
        ("a.jsonl", '{"text": "a"}\n', {"max_mb": 0}, r"data\.max_mb is 0; .*above zero"),
        ("a.jsonl", '{"text": "a"}\n', {"max_mb": "lots"}, r"data\.max_mb is 'lots'; .*above zero"),
        ("a.jsonl", "not JSON\n", {}, r"cannot be read .*check data\.\*"),
        ("a.jsonl", "", {}, r"cannot be read .*check data\.\*"),
        ("a.parquet", "not parquet", {}, r"cannot be read .*check data\.\*"),
        ("a.md", "no data", {}, r"cannot be read .*check data\.\*"),
    ],
)
def test_a_dataset_that_is_not_as_asked_for_is_refused(
    tmp_path: Path, name: str, content: str, options: dict[str, Any], words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        texts_in(HubCorpus(str(tmp_path), **options))


def test_a_byte_order_mark_in_a_dataset_is_dropped(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + name.encode())
    assert texts_in(HubCorpus(str(tmp_path))) == ["a.txt", "b.txt"]


def test_a_hub_that_breaks_off_is_no_silent_wait_and_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_off(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("'disconnected' thrown while requesting GET")
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise RuntimeError("disconnected\nand more")

    monkeypatch.setattr(datasets, "load_dataset", break_off)
    with pytest.raises(UserError, match=r"dataset me/mine cannot be read \(disconnected and more\); check data"):
        texts_in(HubCorpus("me/mine"))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip().splitlines() == [
        "the hub does not answer or broke off: Retrying in 1s [Retry 1/5]."
    ]
    assert datasets.config.STREAMING_READ_MAX_RETRIES < 20


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(index < VOCABULARY for index in ids)


def test_a_trained_tokenizer_has_the_vocabulary_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(END_OF_TEXT)


def test_a_tokenizer_loads_from_its_file_and_from_a_model_directory(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tokenizer_file)).to_str() == tokenizer.to_str()
    assert load_tokenizer(str(tmp_path)).to_str() == tokenizer.to_str()


def with_post_processor(tokenizer: Tokenizer, before: str) -> Tokenizer:
    changed = Tokenizer.from_str(tokenizer.to_str())
    ids = [(before, changed.token_to_id(before))]
    changed.post_processor = processors.TemplateProcessing(single=f"{before} $A", special_tokens=ids)
    return changed


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", -2, 1.5, True, [2, None], {"id": 2}])
def test_a_token_id_that_is_none_is_refused(name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"bos_token_id": 1, "eos_token_id": value}))
    with pytest.raises(UserError, match=rf"{re.escape(name)} has eos_token_id {re.escape(repr(value))}; give a token"):
        special_ids(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "processed", "frame"),
    [
        (None, None, False, ([], [0])),  # <|endoftext|>, by its usual name
        ({"bos_token_id": 5, "eos_token_id": 6}, None, False, ([5], [6])),
        ({"bos_token_id": 5, "eos_token_id": [7, 6]}, None, False, ([5], [7])),
        ({"bos_token_id": 5, "eos_token_id": 5}, None, False, ([], [5])),
        ({"bos_token_id": 5, "eos_token_id": 6}, {"bos_token": None}, False, ([], [6])),
        ({"bos_token_id": 5, "eos_token_id": 6}, {"add_bos_token": True}, False, ([5], [6])),
        ({"eos_token_id": 6}, {"bos_token": None}, True, ([0], [6])),
    ],
)
def test_documents_begin_and_end_as_config_and_tokenizer_say(
    config: dict[str, Any] | None,
    tokenizer_config: dict[str, Any] | None,
    processed: bool,
    frame: tuple[list[int], list[int]],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    used = with_post_processor(tokenizer, END_OF_TEXT) if processed else tokenizer
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
    assert document_frame(used, tmp_path / "tokenizer.json") == frame
    used.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"story {n}"}) + "\n" for n in range(60)))
    size = tokenizer.get_vocab_size()
    tokens = prepare_tokens(TextCorpus(str(tmp_path / "text.jsonl")), str(tmp_path), size, tmp_path / "cache").train
    story = tokenizer.encode("story ").ids
    assert tokens[: len(frame[0] + story)].tolist() == frame[0] + story
    assert tokens[-len(frame[1]) :].tolist() == frame[1]


def test_truncation_and_padding_of_a_tokenizer_file_are_not_obeyed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spoiled = Tokenizer.from_str(tokenizer.to_str())
    spoiled.enable_truncation(3)
    spoiled.enable_padding(length=50)
    spoiled.save(str(tmp_path / "tokenizer.json"))
    text = "many words of a text"
    assert load_tokenizer(str(tmp_path)).encode(text).ids == tokenizer.encode(text).ids


def test_a_special_id_beyond_the_vocabulary_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": size}))
    (tmp_path / "text.txt").write_text("text " * 100)
    with pytest.raises(UserError, match=f"{size + 1} tokens but the model's vocab_size is {size}"):
        prepare_tokens(TextCorpus(str(tmp_path / "text.txt")), str(tmp_path), size, tmp_path / "cache")


def test_every_document_goes_to_one_split_whole(tmp_path: Path) -> None:
    texts = write_documents(200)
    train, validation = split(prepare_tokens(numbered(texts), None, VOCABULARY, tmp_path))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert 1 <= len(validation) <= 30  # one in twenty


def test_a_documents_split_depends_on_its_key_alone(tokenizer_file: Path, tmp_path: Path) -> None:
    def validation_keys(*keyed: tuple[str, str]) -> set[str]:
        data = prepare_tokens(ListCorpus(keyed), str(tokenizer_file), VOCABULARY, tmp_path)
        chosen = set(split(data)[1])
        return {key for key, text in keyed if text in chosen}

    before, others = (numbered(write_documents(100, seed)).keyed for seed in (0, 1))
    more = (("new", "a new document"), *reversed(before), ("newer", "another new document"))
    assert validation_keys(*before) == validation_keys(*others) == validation_keys(*more) - {"new", "newer"}


@pytest.mark.parametrize("count", [1, 3])
def test_few_documents_each_give_their_tail_to_validation(tokenizer_file: Path, tmp_path: Path, count: int) -> None:
    texts = write_documents(count)
    train, validation = split(prepare_tokens(numbered(texts), str(tokenizer_file), VOCABULARY, tmp_path))
    assert [head + tail for head, tail in zip(train, validation, strict=True)] == texts
    assert all(len(tail) == len(text) // 20 for tail, text in zip(validation, texts, strict=True))


def test_long_documents_survive_being_tokenised_in_pieces(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.data.tokens._PIECE", 100)
    texts = [letter * 1234 for letter in string.ascii_letters]
    train, validation = split(prepare_tokens(numbered(texts), str(tokenizer_file), VOCABULARY, tmp_path))
    assert sorted(train + validation) == sorted(texts)


def cached_files(cache: Path) -> dict[Path, int]:
    """Every file of a cache and when it was written."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


def test_tokens_are_made_once(tmp_path: Path) -> None:
    corpus = numbered(write_documents(60))
    first = prepare_tokens(corpus, None, VOCABULARY, tmp_path)
    files = cached_files(tmp_path)
    second = prepare_tokens(corpus, None, VOCABULARY, tmp_path)
    assert cached_files(tmp_path) == files
    assert second.digest == first.digest
    assert np.array_equal(second.train, first.train)
    assert isinstance(second.train, np.memmap) and isinstance(second.validation, np.memmap)


def test_a_corpus_is_never_in_memory_as_a_whole(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(ListCorpus):
        def documents(self) -> Iterator[Document]:
            rng = random.Random(0)
            for number in range(60):
                yield Document(str(number), "".join(rng.choices(string.ascii_letters, k=50_000)))

    monkeypatch.setattr("nas.data.tokens._BATCH", 200_000)
    tracemalloc.start()
    data = prepare_tokens(Stream(()), str(tokenizer_file), VOCABULARY, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) + len(data.validation) > 2_250_000
    assert peak < 6_000_000  # of 3 MB of text and 9 MB of tokens, the pieces under way


def test_processes_that_want_the_same_tokens_make_them_once(tokenizer_file: Path, tmp_path: Path) -> None:
    reads = []

    class Counted(ListCorpus):
        def documents(self) -> Iterator[Document]:
            reads.append(self)
            return super().documents()

    corpus = Counted(numbered(write_documents(60)).keyed)
    with ThreadPoolExecutor(4) as pool:
        digests = list(
            pool.map(lambda _: prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path).digest, range(4))
        )
    assert len(set(digests)) == 1
    assert len(reads) == 1


def test_the_digest_follows_text_and_tokenizer_and_not_where_the_tokens_lie(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    texts = write_documents(60, seed=1)
    corpus = numbered(texts)
    one, other = (prepare_tokens(corpus, None, VOCABULARY, tmp_path / name) for name in ("one", "other"))
    assert one.digest == other.digest
    changed = prepare_tokens(numbered([*texts[:-1], texts[-1] + " and more"]), None, VOCABULARY, tmp_path / "one")
    given_one = prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path / "one")
    assert len({one.digest, changed.digest, given_one.digest}) == 3
    assert len({one.tokenizer.parent, changed.tokenizer.parent, given_one.tokenizer.parent}) == 3
    assert given_one.tokenizer.read_bytes() == tokenizer_file.read_bytes()


def test_what_a_kill_left_is_made_again(tokenizer_file: Path, tmp_path: Path) -> None:
    class Killed(ListCorpus):
        def documents(self) -> Iterator[Document]:
            yield from super().documents()
            if kills:
                raise KeyboardInterrupt(kills.pop())

    kills, corpus = [1], Killed(numbered(write_documents(60)).keyed)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path)
    after = prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path)
    whole = prepare_tokens(ListCorpus(corpus.keyed), str(tokenizer_file), VOCABULARY, tmp_path / "other")
    assert after.digest == whole.digest


@pytest.mark.parametrize("name", ["train.npy", "validation.npy", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", [None, flipped, to(""), to("{}")])
def test_damaged_tokens_are_made_anew(
    tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Damage
) -> None:
    corpus = numbered(write_documents(60))
    before = prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path)
    file, texts = before.tokenizer.with_name(name), split(before)
    content = file.read_bytes()
    harm(file, damage)
    capsys.readouterr()
    after = prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path)
    assert ("damaged and are made anew" in capsys.readouterr().out) == (damage is not None or name != "meta.json")
    assert (after.digest, file.read_bytes(), split(after)) == (before.digest, content, texts)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "holds no text; check data"),
        ([" \n\n"], "holds no text; check data"),
        (["too little"], r"tokenizer of \d+ tokens but .* vocab_size is 300; give more text"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, texts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare_tokens(numbered(texts), None, VOCABULARY, tmp_path)


def test_text_too_short_to_be_split_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leaves \d+ tokens for training and [01] for validation; give more text"):
        prepare_tokens(numbered(["too little"]), str(tokenizer_file), VOCABULARY, tmp_path)


@pytest.mark.parametrize("content", [None, "{}", "not JSON", '{"model_type": "llama"}'])
def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json.* tokenizer\.json"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"300 tokens .* vocab_size is 299; .*smaller tokenizer"):
        prepare_tokens(numbered(["text"]), str(tokenizer_file), 299, tmp_path)
    with pytest.raises(
        UserError, match=r"of 257 tokens but .* vocab_size is 200; give a space with a larger .*tokenizer="
    ):
        train_tokenizer(["text"], 200)


ROW: Tokens = np.arange(1000, dtype=np.uint32)


def test_a_training_batch_is_a_function_of_seed_and_step() -> None:
    batch = training_batch(ROW, seed=3, step=7, rows=5, length=16)
    training_batch(ROW, seed=3, step=8, rows=5, length=16)  # what came between does not count
    assert torch.equal(training_batch(ROW, seed=3, step=7, rows=5, length=16), batch)
    assert not torch.equal(training_batch(ROW, seed=3, step=8, rows=5, length=16), batch)
    assert not torch.equal(training_batch(ROW, seed=4, step=7, rows=5, length=16), batch)


def test_targets_are_inputs_shifted_by_one() -> None:
    batch = training_batch(ROW, seed=0, step=0, rows=50, length=16)
    assert batch.shape == (50, 17)
    assert batch.dtype == torch.int64
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)  # the row counts up


def test_training_windows_reach_both_ends_of_the_text() -> None:
    batch = training_batch(ROW[:20], seed=0, step=0, rows=200, length=16)
    assert batch.min() == 0
    assert batch.max() == 19


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 40))
def test_validation_windows_are_the_same_every_time_and_inside_the_text(tokens: int, windows: int, length: int) -> None:
    row = ROW[:tokens]
    if tokens < length + 1:
        with pytest.raises(UserError, match="give more text"):
            validation_windows(row, windows, length)
        return
    chosen = validation_windows(row, windows, length)
    assert torch.equal(chosen, validation_windows(row, windows, length))
    assert torch.equal(chosen[:, 1:], chosen[:, :-1] + 1)
    assert chosen[0, 0] == 0 and chosen.max() < tokens
    assert 1 <= len(chosen) <= windows
    assert all(later - earlier >= length for earlier, later in zip(chosen[:-1, 0], chosen[1:, 0], strict=True))


@pytest.mark.parametrize("name", ["a[b]c", "a*", "what?"])
def test_a_local_dataset_whose_path_would_be_taken_for_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / name / "deep" / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(
        UserError, match=rf"dataset .*{re.escape(name)}/deep has a \* \? or \[ in its path.*; rename it"
    ):
        texts_in(HubCorpus(str(tmp_path / name / "deep")))


def test_text_shorter_than_a_training_window_is_refused() -> None:
    with pytest.raises(UserError, match="training text has 16 tokens but a window takes 17"):
        training_batch(ROW[:16], seed=0, step=0, rows=1, length=16)
