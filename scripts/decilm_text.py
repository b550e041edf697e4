"""The mixed text of the DeciLM study: novels, and what Debian's packages bring, as compressed shards.

    python scripts/decilm_text.py OUT --novels novels.txt.xz
    python scripts/decilm_text.py OUT --novels FILE --package linux-source-6.1=0.3 --package python3.11-doc=1

OUT becomes a data.path: OUT/00.jsonl.xz and so on, a document a line. ``--package NAME=SHARE`` downloads a package by
apt-get, for the Debian that this machine runs, and takes this share of its files: source code and documentation by
their suffixes, HTML without its tags, archives inside it too, no content twice. A file's turn and shard are a hash of
its path or content, so the same versions of the packages, which are printed, make the same text. Every shard is a
mixture of all: the proxies' tokenizer, a byte-level BPE of 8,192 entries, is trained on the beginning of the first.

A billion tokens are some 3.7 GB of such text. What fits 60 MB compressed is a fifth of that or less, so a training of a
billion tokens sees it several times; the last line tells how much it is.
"""

import argparse
import contextlib
import hashlib
import html
import json
import lzma
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PACKAGES = ("linux-source-6.1=0.3", "linux-doc-6.1=0.5", "python3.11-doc=1", "debian-reference-en=1")
SUFFIXES = (".c", ".h", ".rst", ".txt", ".md", ".py", ".S", ".html", ".texi", ".rs", ".sh", ".yaml")
ARCHIVE = re.compile(r"\.tar\.(xz|gz|bz2)$")
SIZES = range(500, 500_000)  # bytes of a file that is taken: larger ones are tables of registers
PIECE = 20_000  # characters of a novel in one document
TAGS = re.compile(r"<(script|style)\b.*?</\1>|<[^>]+>", re.DOTALL)
SHARDS = 8


def chance(content: bytes) -> float:
    """A number from 0 to 1 by hash."""
    return int.from_bytes(hashlib.sha256(content).digest()[:4]) / 2**32


def package_texts(name: str, share: float) -> Iterator[str]:
    """Texts of a share of a Debian package's files."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        print(package.name, flush=True)
        unpacking = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
        assert unpacking.stdout
        for path, content in archive_files(unpacking.stdout, "r|"):
            if chance(path.encode()) < share:
                text = content.decode("utf-8", errors="replace")
                yield html.unescape(TAGS.sub(" ", text)) if path.endswith(".html") else text
        unpacking.communicate()
        assert unpacking.returncode == 0, f"{package} is damaged"


def archive_files(stream: IO[bytes], mode: Any) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the text files of an archive that is read as a stream, and of archives in it."""
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content and (packed := ARCHIVE.search(member.name)):
                yield from archive_files(content, f"r|{packed[1]}")
            elif content and member.name.endswith(SUFFIXES) and member.size in SIZES:
                yield member.name, content.read()


def all_texts(novels: Path | None, packages: list[str]) -> Iterator[str]:
    """The documents of all sources."""
    if novels:
        content = novels.read_bytes()
        prose = (lzma.decompress(content) if novels.suffix == ".xz" else content).decode()
        yield from (prose[at : at + PIECE] for at in range(0, len(prose), PIECE))
    for package in packages:
        name, _, share = package.partition("=")
        yield from package_texts(name, float(share or 1))


def main(out: Path, novels: Path | None, packages: list[str]) -> None:
    """Writes the shards; until all are whole they have other names."""
    out.mkdir(parents=True, exist_ok=True)
    seen, characters = set[bytes](), 0
    unfinished = [out / f"{number:02d}.jsonl.xz.unfinished" for number in range(SHARDS)]
    with contextlib.ExitStack() as files:
        shards = [files.enter_context(lzma.open(path, "wt", encoding="utf-8")) for path in unfinished]
        for text in all_texts(novels, packages):
            content = text.encode()
            if (digest := hashlib.sha256(content).digest()) not in seen:
                seen.add(digest)
                characters += len(text)
                shards[int(chance(content) * SHARDS)].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    size = sum(path.rename(path.with_suffix("")).stat().st_size for path in unfinished)
    print(
        f"{len(seen):,} documents of {characters / 1e6:.0f} million characters, {size / 1e6:.1f} MB compressed: {out}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the shards, which are made anew")
    parser.add_argument("--novels", type=Path, help="a .txt or .txt.xz, cut into documents")
    parser.add_argument("--package", action="append", metavar="NAME=SHARE", help=f"default: {' '.join(PACKAGES)}")
    given = parser.parse_args()
    main(given.out, given.novels, given.package or list(PACKAGES))
