"""Text in, seeded batches out: corpora, tokenizer, splits, the cache on disk, and batches."""

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import string
import sysconfig
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nas.data import TokenData, prepare_tokens, training_batch, validation_windows
from nas.data.corpora import Document, HubCorpus, StdlibCorpus, TextCorpus
from nas.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, train_tokenizer
from nas.data.tokens import Tokens
from nas.errors import UserError

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


def test_the_standard_library_is_read_without_tests_and_installed_packages() -> None:
    keys = [document.key for document in StdlibCorpus().documents()]
    assert {"argparse.py", "json/decoder.py"} <= set(keys)
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [key for key in keys if left_out & set(key.split("/"))]
    assert (Path(sysconfig.get_path("stdlib")) / keys[0]).is_file()


def test_the_standard_library_reads_the_same_every_time() -> None:
    assert list(StdlibCorpus().documents()) == list(StdlibCorpus().documents())
    assert StdlibCorpus().fingerprint() == StdlibCorpus().fingerprint()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_text_gives_the_same_document(tmp_path: Path, suffix: str) -> None:
    text = "\n".join(write_documents(3)).replace("\r\n", "\n")
    file = tmp_path / f"t.txt{suffix}"
    file.write_bytes(PACKERS[suffix](text.encode()))
    assert [document.text for document in TextCorpus(str(file)).documents()] == [text]


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_json_lines_give_the_same_documents_as_text_files(tmp_path: Path, suffix: str) -> None:
    texts = [text.replace("\r\n", "\n") for text in write_documents(3)]
    (tmp_path / "plain").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "plain" / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = "\n\n".join(json.dumps({"text": text, "id": 1}) for text in texts)
    (tmp_path / f"t.jsonl{suffix}").write_bytes(PACKERS[suffix](lines.encode()))
    plain, packed = TextCorpus(str(tmp_path / "plain")), TextCorpus(str(tmp_path / f"t.jsonl{suffix}"))
    assert list(packed.documents()) == list(plain.documents())
    assert [document.text for document in packed.documents()] == texts


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".bz2"])
def test_a_file_packed_in_several_pieces_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t.txt{suffix}"
    file.write_bytes(PACKERS[suffix](b"first half, ") + PACKERS[suffix](b"second half"))
    assert [document.text for document in TextCorpus(str(file)).documents()] == ["first half, second half"]


def test_another_key_of_json_lines_can_hold_the_text(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "no", "body": "yes"}\n')
    assert [document.text for document in TextCorpus(str(file), text_key="body").documents()] == ["yes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with text at two levels, and with a file that is no text."""
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.md", "a.txt.md5"):
        (folder / name).write_text(f"text of {name}")
    return folder


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", ["a.txt", "b.txt", "deep/c.txt"]),
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "deep/c.txt"]),
        ("[ac].txt", ["a.txt"]),
        ("deep", ["deep/c.txt"]),
        ("b.txt", ["b.txt"]),
    ],
)
def test_a_path_can_be_a_file_a_folder_or_a_pattern(folder: Path, path: str, names: list[str]) -> None:
    corpus = TextCorpus(str(folder / path))
    assert [document.text for document in corpus.documents()] == [f"text of {name}" for name in names]


def test_the_fingerprint_of_text_follows_its_content(folder: Path) -> None:
    corpus = TextCorpus(str(folder))
    before = corpus.fingerprint()
    os.utime(folder / "a.txt", (1, 1))
    assert corpus.fingerprint() == before
    (folder / "a.txt").write_text("text of b.txt")
    assert corpus.fingerprint() != before


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


def test_a_dataset_is_read_in_its_order(dataset: Path) -> None:
    texts = [document.text for document in HubCorpus(str(dataset)).documents()]
    assert [text[0] for text in texts] == list("0123456789")
    assert {len(text) for text in texts} == {100_000}


def test_a_dataset_is_read_up_to_a_number_of_megabytes(dataset: Path) -> None:
    assert len(list(HubCorpus(str(dataset), max_mb=0.3).documents())) == 3


def test_a_document_of_a_dataset_keeps_its_key_under_any_limit(dataset: Path) -> None:
    few, many = (list(HubCorpus(str(dataset), max_mb=size).documents()) for size in (0.2, 0.5))
    assert few == many[:2]
    assert len({document.key for document in many}) == 5


def test_a_dataset_without_the_column_is_refused_with_those_it_has(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'body' but text, id; set data\.text_key"):
        list(HubCorpus(str(dataset), text_key="body").documents())


def test_the_fingerprint_of_a_local_dataset_follows_its_files(dataset: Path) -> None:
    corpus = HubCorpus(str(dataset))
    before = corpus.fingerprint()
    assert corpus.fingerprint() == before
    shutil.copy(next(dataset.iterdir()), dataset / "more.txt")
    assert corpus.fingerprint() != before


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(index < VOCABULARY for index in ids)


def test_a_trained_tokenizer_has_the_vocabulary_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(END_OF_TEXT)


def test_the_same_text_trains_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(write_documents(20), VOCABULARY).to_str() == tokenizer.to_str()


def test_a_tokenizer_loads_from_its_file_and_from_a_model_directory(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tokenizer_file)).to_str() == tokenizer.to_str()
    assert load_tokenizer(str(tmp_path)).to_str() == tokenizer.to_str()


def test_a_given_tokenizer_is_the_one_used(tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path) -> None:
    data = prepare_tokens(numbered(write_documents(60, seed=1)), str(tokenizer_file), VOCABULARY, tmp_path)
    assert load_tokenizer(str(data.tokenizer)).to_str() == tokenizer.to_str()


def test_every_document_goes_to_one_split_whole(tmp_path: Path) -> None:
    texts = write_documents(200)
    train, validation = split(prepare_tokens(numbered(texts), None, VOCABULARY, tmp_path))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert 1 <= len(validation) <= 30  # one in twenty


def test_a_document_stays_in_its_split_when_others_come_or_move(tokenizer_file: Path, tmp_path: Path) -> None:
    keyed = numbered(write_documents(100)).keyed
    more = (("new", "a new document"), *reversed(keyed), ("newer", "another new document"))
    before, after = (
        split(prepare_tokens(ListCorpus(documents), str(tokenizer_file), VOCABULARY, tmp_path))
        for documents in (keyed, more)
    )
    assert set(before[0]) <= set(after[0])
    assert set(before[1]) <= set(after[1])


def test_a_documents_split_depends_on_its_key_and_not_on_its_text(tokenizer_file: Path, tmp_path: Path) -> None:
    def validation_keys(texts: list[str]) -> set[str]:
        corpus = numbered(texts)
        data = prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path)
        chosen = set(texts_of(data.validation, data.tokenizer))
        return {key for key, text in corpus.keyed if text in chosen}

    assert validation_keys(write_documents(100)) == validation_keys(write_documents(100, seed=1))


def test_few_documents_each_give_their_tail_to_validation(tokenizer_file: Path, tmp_path: Path) -> None:
    texts = write_documents(3)
    train, validation = split(prepare_tokens(numbered(texts), str(tokenizer_file), VOCABULARY, tmp_path))
    assert [head + tail for head, tail in zip(train, validation, strict=True)] == texts
    assert all(len(tail) == len(text) // 20 for tail, text in zip(validation, texts, strict=True))


def test_a_corpus_with_a_single_document_is_enough(tokenizer_file: Path, tmp_path: Path) -> None:
    train, validation = split(prepare_tokens(numbered(write_documents(1)), str(tokenizer_file), VOCABULARY, tmp_path))
    assert len(train) == len(validation) == 1


def test_long_documents_survive_being_tokenised_in_pieces(tokenizer_file: Path, tmp_path: Path) -> None:
    texts = [letter * 123_456 for letter in string.ascii_letters]
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


def test_tokens_are_read_where_they_lie_on_disk(tmp_path: Path) -> None:
    data = prepare_tokens(numbered(write_documents(60)), None, VOCABULARY, tmp_path)
    assert isinstance(data.train, np.memmap)
    assert isinstance(data.validation, np.memmap)


def test_a_corpus_is_never_in_memory_as_a_whole(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(ListCorpus):
        def documents(self) -> Iterator[Document]:
            rng = random.Random(0)
            for number in range(120):
                yield Document(str(number), "".join(rng.choices(string.ascii_letters, k=50_000)))

    monkeypatch.setattr("nas.data.tokens._BATCH", 200_000)
    tracemalloc.start()
    data = prepare_tokens(Stream(()), str(tokenizer_file), VOCABULARY, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) + len(data.validation) > 4_500_000
    assert peak < 9_000_000  # of 6 MB of text and 18 MB of tokens, the pieces under way


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


def test_changed_text_gives_other_tokens_and_another_digest(tmp_path: Path) -> None:
    texts = write_documents(60)
    first = prepare_tokens(numbered(texts), None, VOCABULARY, tmp_path)
    changed = prepare_tokens(numbered([*texts[:-1], texts[-1] + " and more"]), None, VOCABULARY, tmp_path)
    assert changed.digest != first.digest
    assert changed.tokenizer.parent != first.tokenizer.parent


def test_the_digest_does_not_depend_on_where_the_tokens_lie(tmp_path: Path) -> None:
    corpus = numbered(write_documents(60))
    one, other = (prepare_tokens(corpus, None, VOCABULARY, tmp_path / name) for name in ("one", "other"))
    assert one.digest == other.digest


def test_another_tokenizer_gives_another_digest(tokenizer_file: Path, tmp_path: Path) -> None:
    corpus = numbered(write_documents(60, seed=1))
    trained = prepare_tokens(corpus, None, VOCABULARY, tmp_path)
    given_one = prepare_tokens(corpus, str(tokenizer_file), VOCABULARY, tmp_path)
    assert trained.digest != given_one.digest


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
@given(
    tokens=st.integers(2, 300),
    windows=st.integers(1, 20),
    length=st.integers(1, 40),
)
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


def test_text_shorter_than_a_training_window_is_refused() -> None:
    with pytest.raises(UserError, match="training text has 16 tokens but a window takes 17"):
        training_batch(ROW[:16], seed=0, step=0, rows=1, length=16)
