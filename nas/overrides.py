"""What the words of a command line mean, before Hydra reads them.

In Hydra's language ``2025_11_28`` and ``1e3`` are numbers and ``[data]`` is a list. Here the type of a key decides: the
value of a text stays as it was typed, and a whole number may be written as ``1e3``.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nas.config import STAGES
from nas.resources import shipped

_SWEEPS = {"-m", "--multirun"}
_PROMPT = "prompt"


def is_sweep(words: Sequence[str]) -> bool:
    """Whether Hydra is to run the command once for each combination of values."""
    return not _SWEEPS.isdisjoint(words)


def to_hydra(stage: str, words: Sequence[str]) -> list[str]:
    """The command line of a stage in Hydra's language."""
    if not is_sweep(words):
        return [_typed(stage, word) for word in _expand_budget(words)]
    return _name_sweep_by_what_it_varies([_typed_sweep(stage, word) for word in _expand_budget(words)])


def _expand_budget(words: Sequence[str]) -> Iterator[str]:
    """``--budget 200`` and ``--budget=200`` are sugar for ``budget=200``."""
    following = iter(words)
    for word in following:
        if word == "--budget":
            yield f"budget={next(following, '')}"
        else:
            yield word.removeprefix("--") if word.startswith("--budget=") else word


def _typed_sweep(stage: str, word: str) -> str:
    """As `_typed`, for each of the values that are swept over."""
    key, _, text = word.partition("=")
    if key == _PROMPT or re.search(r"""["'\[({]""", text):
        return _typed(stage, word)
    values = (_typed(stage, f"{key}={value}").partition("=")[2] for value in text.split(","))
    return f"{key}={','.join(values)}" if text else word


def _typed(stage: str, word: str) -> str:
    """An override whose value Hydra reads as the type of its key.

    Text is quoted where Hydra would read anything else, and so is what Hydra's language does not know at all. A prompt
    is always text as it is. ``~`` at the beginning is the home directory, as a shell has it only before a word.
    """
    key, equals, text = word.partition("=")
    if not equals or word.startswith(("-", "~")):
        return word
    if key == _PROMPT:
        return f"{key}={_quoted(text)}"
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        quoted = f"{key}={_quoted(str(Path(text).expanduser()) if text.startswith('~') else text)}"
        return quoted if _is_hydras(quoted) else word
    value: Any = override.value()
    if override.is_sweep_override() or isinstance(value, str):
        return word
    types = _types(stage, key.lstrip("+"))
    if "str" in types:
        return word if value is None and "None" in types else f"{key}={_quoted(text)}"
    if not types.isdisjoint(("int", "Any")):
        if isinstance(value, float):
            return f"{key}={_whole(value)}"
        if isinstance(value, list) and any(isinstance(number, float) for number in value):
            return f"{key}={list(map(_whole, value))}"
    return word


def _whole(number: object) -> object:
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _quoted(text: str) -> str:
    literal = re.sub(r"(\\*)\$\{", r"\1\1\${", text)  # no interpolation, for OmegaConf
    return QuotedString(literal, Quote.double).with_quotes()


def _is_hydras(word: str) -> bool:
    with suppress(HydraException):
        OverridesParser.create().parse_override(word)
        return True
    return False


def _types(stage: str, key: str) -> set[str]:
    """Names of the types that a key's value may have, by the schema or by the classes that a group of conf/ offers."""
    group, _, name = key.partition(".")
    annotations: list[Any] = []
    for file in (shipped("conf") / group).glob("*.yaml"):
        if target := OmegaConf.select(OmegaConf.load(file), "_target_"):
            parameters = inspect.signature(hydra.utils.get_class(target)).parameters
            annotations += [parameters[name].annotation] if name in parameters else []
    kind: Any = STAGES[stage]
    for name in key.split("."):
        kind = next((f.type for f in dataclasses.fields(kind) if f.name == name), None) if _is_schema(kind) else None
    annotations += [kind] if kind else []
    types = set(re.findall(r"\w+", " ".join(map(inspect.formatannotation, annotations))))
    return set() if "dict" in types else types - {"str"} if "list" in types else types


def _is_schema(kind: object) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _name_sweep_by_what_it_varies(words: list[str]) -> list[str]:
    """Keeps overrides that are the same in all runs of a sweep out of the names of their folders."""
    given = [word for word in words if "=" in word and not word.startswith("-")]
    with suppress(HydraException):  # Hydra says what is wrong with an override
        overrides = OverridesParser.create().parse_overrides(given)
        fixed = [override.key_or_group for override in overrides if not override.is_sweep_override()]
        at = words.index(given[0]) if given else len(words)  # Hydra wants all overrides together
        return [*words[:at], f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]", *words[at:]]
    return words
