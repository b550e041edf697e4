"""Search spaces and group vectors: what can be searched, without a tensor in sight.

A *vector* holds the number of KV groups ``g`` of every layer and is written ``4-2-2-1``. A *search space* is a model
shape and the groups that each layer may have.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nas.errors import UserError
from nas.resources import shipped
from nas.shape import ModelShape

Vector = tuple[int, ...]


def format_vector(vector: Sequence[int]) -> str:
    """``(4, 2, 1)`` -> ``"4-2-1"``."""
    return "-".join(map(str, vector))


@dataclass(frozen=True)
class SearchSpace:
    """A model shape and, for every layer, the KV groups that it may keep."""

    name: str  # the stem of its YAML file, or the name of the checkpoint's folder that it was derived from
    shape: ModelShape
    choices: tuple[Vector, ...]  # per layer the allowed groups, ascending
    known_vectors: Mapping[str, Vector] = dataclasses.field(default_factory=dict)  # published ones by name

    def __post_init__(self) -> None:
        layers, heads = self.shape.num_hidden_layers, self.shape.num_attention_heads
        if len(self.choices) != layers:
            raise ValueError(f"kv_groups lists {len(self.choices)} layers but num_hidden_layers is {layers}")
        for layer, allowed in enumerate(self.choices):
            if not allowed:
                raise ValueError(f"kv_groups of layer {layer} is empty; list at least one number of groups")
            for groups in allowed:
                if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or heads % groups:
                    divisors = ", ".join(str(g) for g in range(1, heads + 1) if heads % g == 0)
                    raise ValueError(
                        f"kv_groups has {groups!r} in layer {layer}, which does not divide the {heads} attention "
                        f"heads; use any of {divisors}"
                    )
        for name, vector in self.known_vectors.items():
            try:
                self.check(vector)
            except UserError as error:
                raise ValueError(f"known vector {name}: {error}") from None

    @property
    def largest(self) -> Vector:
        """The vector with the most groups everywhere."""
        return tuple(allowed[-1] for allowed in self.choices)

    @property
    def smallest(self) -> Vector:
        """The vector with the fewest groups everywhere."""
        return tuple(allowed[0] for allowed in self.choices)

    @property
    def middle(self) -> Vector:
        """The middle choice of every layer."""
        return tuple(allowed[(len(allowed) - 1) // 2] for allowed in self.choices)

    @property
    def size(self) -> int:
        """How many vectors the space holds."""
        return math.prod(len(allowed) for allowed in self.choices)

    def uniform_vectors(self) -> list[Vector]:
        """The vectors with the same groups in every layer, fewest first."""
        common = set(self.choices[0]).intersection(*self.choices[1:])
        return [(groups,) * len(self.choices) for groups in sorted(common)]

    def reference_vectors(self) -> dict[str, Vector]:
        """The vectors that every search evaluates first, by name: smallest, uniform, largest, then known ones."""
        named = {"smallest": self.smallest, "largest": self.largest}
        named = {name: vector for name, vector in named.items() if vector not in self.uniform_vectors()}
        named |= {f"uniform {vector[0]}": vector for vector in self.uniform_vectors()}
        return named | dict(self.known_vectors)

    def check(self, vector: Sequence[int]) -> Vector:
        """Returns ``vector`` as a tuple.

        Raises:
            UserError: Its length or one of its entries is not of this space.
        """
        if len(vector) != len(self.choices):
            raise UserError(
                f"vector {format_vector(vector)} has {len(vector)} layers but space {self.name} has "
                f"{len(self.choices)}; give one number of groups per layer"
            )
        for layer, (groups, allowed) in enumerate(zip(vector, self.choices, strict=True)):
            if groups not in allowed:
                raise UserError(
                    f"vector {format_vector(vector)} has {groups} groups in layer {layer} but space {self.name} "
                    f"allows {', '.join(map(str, allowed))} there"
                )
        return tuple(vector)

    def choice_indices(self, vectors: Iterable[Vector]) -> list[list[int]]:
        """For each vector, the number of its choice in every layer.

        Raises:
            UserError: One of them is not of this space.
        """
        return [
            [allowed.index(g) for g, allowed in zip(self.check(vector), self.choices, strict=True)]
            for vector in vectors
        ]

    def parse(self, text: str) -> Vector:
        """Parses ``4-2-2-1`` and checks it against the space; see `check`."""
        return self.check(parse_vector(text))

    def to_dict(self) -> dict[str, Any]:
        """The space as plain values, as its YAML file states it; `space_from_dict` reads it back."""
        return {
            **self.shape.to_dict(),
            "kv_groups": [list(allowed) for allowed in self.choices],
            "known_vectors": {name: format_vector(vector) for name, vector in self.known_vectors.items()},
        }


def parse_vector(text: str) -> Vector:
    """``"4-2-1"`` -> ``(4, 2, 1)``.

    Raises:
        UserError: The text is not numbers joined by dashes.
    """
    try:
        return tuple(int(part) for part in text.split("-"))
    except ValueError:
        raise UserError(f"'{text}' is not a vector; write one number of groups per layer, such as 4-2-2-1") from None


def space_from_dict(name: str, values: Mapping[str, Any]) -> SearchSpace:
    """Builds a space from the contents of a YAML file.

    Raises:
        ValueError, UserError: A value is missing, unknown or out of range; the message names it.
    """
    fields = {field.name: field for field in dataclasses.fields(ModelShape)}
    if unknown := values.keys() - fields.keys() - {"kv_groups", "known_vectors"}:
        names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"unknown key {names}; known are {', '.join(fields)}, kv_groups, known_vectors")
    required = {field.name for field in fields.values() if field.default is dataclasses.MISSING} | {"kv_groups"}
    if missing := required - values.keys():
        raise ValueError(f"{', '.join(sorted(missing))} is missing; add it")
    shape = ModelShape(**{key: values[key] for key in values if key in fields})
    stated = values["kv_groups"]
    nested = isinstance(stated, list) and any(isinstance(allowed, list) for allowed in stated)
    per_layer = stated if nested else [stated] * shape.num_hidden_layers
    lists = bool(stated) and all(isinstance(allowed, list) for allowed in per_layer)
    if not lists or not all(isinstance(groups, int) for allowed in per_layer for groups in allowed):
        raise ValueError(f"kv_groups is {stated!r}; give a list of whole numbers, or one such list per layer")
    named = values.get("known_vectors") or {}
    if not isinstance(named, dict):
        raise ValueError(f"known_vectors is {named!r}; give a vector such as 4-2-2-1 by name")
    known = {str(name): parse_vector(str(text)) for name, text in named.items()}
    return SearchSpace(name, shape, tuple(tuple(sorted(set(allowed))) for allowed in per_layer), known)


def space_from_config(values: Mapping[str, Any]) -> SearchSpace:
    """The space of a run, as its config records it: `SearchSpace.to_dict` and the name."""
    return space_from_dict(values["name"], {key: value for key, value in values.items() if key != "name"})


class _YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as it is in JSON, and not only 1.0e-5."""


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def shipped_spaces() -> Iterator[str]:
    """Names of the spaces that come with the package."""
    return (path.stem for path in sorted(shipped("search_spaces").glob("*.yaml")))


def load_space(reference: str) -> SearchSpace:
    """Loads a space by the name of a shipped one or by the path of a YAML file.

    Raises:
        UserError: There is no such space, or its file is not valid.
    """
    is_path = reference.endswith((".yaml", ".yml"))
    path = Path(reference) if is_path else shipped("search_spaces") / f"{reference}.yaml"
    if not path.is_file() or (not is_path and "/" in reference):
        raise UserError(
            f"there is no search space '{reference}'; use {', '.join(shipped_spaces())}, the path of a .yaml file, or "
            "a trained model's directory"
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)  # safe: it makes plain values only
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping of keys to values; see the shipped ones")
        return space_from_dict(path.stem, values)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"search space {path} is not valid YAML: {problem}") from None
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"search space {path}: {error}") from None
