"""The documentation site: README, docs/, and a page of all commands and keys, made from nas/config.py and conf/."""

import inspect
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from docutils.nodes import document
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

from nas import shipped
from nas.cli import USAGE
from nas.config import STAGES, register
from nas.metrics import LIMITS

project = html_title = "gqa-nas"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "docs/**.md"]
myst_heading_anchors = 3  # as GitHub has them
highlight_language = "none"
html_theme = "furo"
html_copy_source = False
html_show_search_summary = False  # a page opened from a disk may not read others

_CONTENTS = {
    "Tutorials": ["docs/tutorials/from-text", "docs/tutorials/from-a-checkpoint", "docs/tutorials/many-workers"],
    "Reference": ["docs/reference", "docs/report", "docs/engines", "docs/recipes"],
}  # all other pages follow


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add)
    app.connect("doctree-read", _unlink_folders)


def _add(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds what GitHub should not show, or cannot."""
    if page == root_doc:
        others = app.env.found_docs.difference([page], *_CONTENTS.values())
        for caption, pages in (_CONTENTS | {"How it works, how well": sorted(others)}).items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n" + "\n".join(pages) + "\n```\n"
    elif page == "docs/reference":
        source[0] += "\n\n".join(_reference())


def _unlink_folders(app: Sphinx, tree: document) -> None:
    """Leaves the names of folders, of which only files can come along."""
    for link in list(tree.findall(pending_xref)):
        if not link["refdomain"] and (app.env.doc2path(link["refdoc"]).parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def _reference() -> Iterator[str]:
    register()
    yield f"```\n{USAGE}\n```"
    conf = shipped("conf")
    with initialize_config_dir(str(conf), version_base="1.3"):
        for stage, schema in STAGES.items():
            example, _, does = (conf / f"{stage}.yaml").read_text().splitlines()[0].removeprefix("# ").partition(": ")
            yield f"## nas {stage}\n\n`{example}`: {does}"
            config = compose(stage, return_hydra_config=True)
            groups = {key: f"{key}={choice or 'null'}" for key, choice in config.hydra.runtime.choices.items()}
            yield from _keys(schema, OmegaConf.to_container(config), groups)
    for folder in sorted(filter(Path.is_dir, conf.iterdir())):
        yield f"## {folder.name}="
        for file in sorted(folder.glob("*.yaml")):
            yield f"`{folder.name}={file.stem}`:\n\n```yaml\n{file.read_text()}```"


def _keys(schema: type, values: Any, groups: dict[str, str], prefix: str = "") -> Iterator[str]:
    """A table of the keys of one config class, and one of each that it contains."""
    said, inner = _comments(schema), []
    table = ["| key | default | meaning |", "| --- | --- | --- |"]
    for field in fields(schema):
        key, value = f"{prefix}{field.name}", values[field.name]
        if isinstance(field.type, type) and is_dataclass(field.type):
            inner.append(f"### {key}.\\*\n\n{inspect.getdoc(field.type)}")
            inner.extend(_keys(field.type, value, groups, f"{key}."))
        else:
            default = "needed" if value == "???" else f"`{groups.get(key) or json.dumps(value).strip(chr(34))}`"
            meaning = said.get(field.name, "").replace("|", r"\|")
            table.append(f"| `{key}` | {default} | {meaning} |")
    yield "\n".join(table)
    yield from inner


def _comments(schema: type) -> dict[str, str]:
    """What the comments above and beside the fields of a config class say."""
    said, above = {key: metric.label for key, metric in LIMITS.items()}, ""
    for one in reversed(schema.__mro__):
        with suppress(OSError, TypeError):  # `object`, and the class that nas/config.py makes from LIMITS
            for line in inspect.getsource(one).splitlines():
                code, _, comment = map(str.strip, line.partition("# "))
                above += f" {comment}"
                if code:
                    said[code.partition(":")[0]] = above.strip()
                    above = ""
    return said
