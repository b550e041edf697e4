"""What the words of a command line mean, before Hydra reads them.

In Hydra's language ``2025_11_28`` and ``1e3`` are numbers and ``[data]`` is a list. Here the key decides: the value of
a text stays as it was typed, and an integer may be written as ``1e3``.
"""

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nas import shipped
from nas.config import STAGES
from nas.errors import UserError, without_passwords

_DECIMALS = re.compile(r"[][\d,+ -]*[.eE][][\d,+ .eE-]*")  # a number, or a list of some, not all written as integers


def to_hydra(stage: str, words: Sequence[str]) -> list[str]:
    """The command line of a stage in Hydra's language.

    ``--budget 200`` and ``--budget=200`` become ``budget=200``, and ``init=DIR`` is ``init.checkpoint=DIR``.
    """
    left = iter(words)
    overrides = [f"budget={next(left, '')}" if w == "--budget" else re.sub("^--budget=", "budget=", w) for w in left]
    if _type(stage, "init.checkpoint"):
        overrides = [re.sub("^init=", "init.checkpoint=", word) for word in overrides]
    if "-m" not in words and "--multirun" not in words:
        several = [re.sub(r"^(export|objectives)=([\w-]+(,[\w-]+)+)$", r"\1=[\2]", word) for word in overrides]
        return [_typed(stage, word) for word in several]
    if any(without_passwords(word) != word for word in words):
        fix = "give it in PGPASSWORD or ~/.pgpass instead"
        raise UserError(f"a sweep's command line is written to multirun.yaml, and a password in it would be too; {fix}")
    return _name_sweep_by_what_it_varies([_typed_sweep(stage, word) for word in overrides])


def _typed_sweep(stage: str, word: str) -> str:
    key, _, text = word.partition("=")
    if key == "prompt" or not text or re.search(r"""["'\[({]""", text):
        return _typed(stage, word)
    return f"{key}=" + ",".join(_typed(stage, f"{key}={value}").partition("=")[2] for value in text.split(","))


def _typed(stage: str, word: str) -> str:
    """An override whose value Hydra reads as the type of its key.

    Text is quoted where Hydra would read anything else or nothing at all. A prompt is always text as it is. ``~`` at
    the beginning is the home directory, as a shell has it only before a word.
    """
    key, equals, text = word.partition("=")
    if not equals or word.startswith(("-", "~")):
        return word
    if key == "prompt":
        return f"{key}={_quoted(text)}"
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return f"{key}={_quoted(str(Path(text).expanduser()) if text.startswith('~') else text)}"
    value: Any = override.value()
    if override.is_sweep_override() or isinstance(value, str):
        return word
    expected = _type(stage, key.lstrip("+"))
    if expected is str or (expected == str | None and value is not None):
        return f"{key}={_quoted(text)}"
    return f"{key}={_integers(value)}" if _DECIMALS.fullmatch(text) else word


def _integers(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_integers, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _quoted(text: str) -> str:
    literal = re.sub(r"(\\*)\$\{", r"\1\1\${", text)  # no interpolation, for OmegaConf
    return QuotedString(literal, Quote.double).with_quotes()


def _type(stage: str, key: str) -> Any:
    """The type of a key by the schema. A key of a group of conf/ is text unless its default is a number."""
    group, _, name = key.partition(".")
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(STAGES[stage])}
    if not name:
        return types.get(key)
    if dataclasses.is_dataclass(types.get(group)):
        return next((field.type for field in dataclasses.fields(types[group]) if field.name == name), None)
    files = [OmegaConf.to_container(OmegaConf.load(file)) for file in (shipped("conf") / group).glob("*.yaml")]
    defaults = [file[name] for file in files if isinstance(file, dict) and name in file]
    return str | None if defaults and not any(isinstance(default, int | float) for default in defaults) else None


def _name_sweep_by_what_it_varies(words: list[str]) -> list[str]:
    """Keeps overrides that are the same in all runs of a sweep out of the names of their folders."""
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    fixed = []
    for override in overrides:
        with suppress(HydraException):  # Hydra says what is wrong with an override
            parsed = OverridesParser.create().parse_override(override)
            fixed += [] if parsed.is_sweep_override() else [parsed.key_or_group]
    flags = [word for word in words if word not in overrides]  # Hydra wants all overrides together
    return [*flags, *overrides, f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"]
