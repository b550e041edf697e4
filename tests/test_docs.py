"""The documentation site: it is complete, opens from a disk, and no link of it leads nowhere."""

import re
from dataclasses import fields, is_dataclass
from html import unescape
from pathlib import Path

import pytest
from sphinx.cmd.build import build_main

from nas.config import STAGES

ROOT = Path(__file__).parents[1]


def built(source: Path, site: Path, *more: str) -> int:
    """Builds as ``make docs`` does; returns the exit code."""
    return build_main(["-nEWq", "--keep-going", "-c", str(ROOT / "docs"), *more, str(source), str(site)])


def keys(schema: type, prefix: str = "") -> list[str]:
    found = []
    for field in fields(schema):
        inner = field.type if isinstance(field.type, type) and is_dataclass(field.type) else None
        found += keys(inner, f"{prefix}{field.name}.") if inner else [prefix + field.name]
    return found


def test_the_site_needs_no_network_and_says_what_every_key_means(tmp_path: Path) -> None:
    assert built(ROOT, tmp_path) == 0
    pages = {str(page.relative_to(tmp_path)): page.read_text() for page in tmp_path.rglob("*.html")}
    for page in ROOT.glob("docs/**/*.md"):
        assert str(page.relative_to(ROOT).with_suffix(".html")) in pages
    for html in pages.values():
        assert not re.search(r'<(script|img)[^>]* src="(https?:)?//|<link[^>]* href="(https?:)?//', html)
    reference = pages["docs/reference.html"]
    for stage, schema in STAGES.items():
        section = re.search(rf'<section id="nas-{stage}">.*?(?=<section id="nas-|<section id="data">)', reference, re.S)
        assert section
        rows = re.findall(r"<tr[^>]*>\s*<td>(.*?)</td>\s*<td>.*?</td>\s*<td>(.*?)</td>", section[0], re.S)
        said = {re.sub("<.*?>", "", key): unescape(re.sub("<.*?>", "", meaning)).strip() for key, meaning in rows}
        assert sorted(said) == sorted(keys(schema))
        assert all(said.values()), [key for key, meaning in said.items() if not meaning]


@pytest.mark.parametrize("last", ["", "[a](none.md)", "[a](#none)", "[a](nothing.csv)", "![a](none.png)"])
def test_what_does_not_exist_fails_the_build(last: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# Page\n\n[a](#page), [b](page.md), [c](data.csv)\n{last}\n")
    (tmp_path / "data.csv").write_text("a\n")
    only = ("-D", "root_doc=page", "-D", "include_patterns=page.md")
    assert built(tmp_path, tmp_path / "site", *only) == bool(last)
