"""Search spaces and group vectors; without torch.

A *vector* holds the number of KV groups ``g`` of every layer and is written ``4-2-2-1``. A *search space* is a model
shape and the groups that each layer may have. A search may take its losses from one space, a small proxy, and its costs
from another, the *served* one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nas import shipped
from nas.errors import UserError
from nas.shape import ModelShape

Vector = tuple[int, ...]


def format_vector(vector: Sequence[int]) -> str:
    return "-".join(map(str, vector))


def parse_vector(text: str) -> Vector:
    try:
        return tuple(map(int, text.split("-")))
    except ValueError:
        raise UserError(f"'{text}' is not a vector; write one number of groups per layer, such as 4-2-2-1") from None


@dataclass(frozen=True)
class SearchSpace:
    name: str  # the stem of its YAML file, or the name of the checkpoint's folder that it was derived from
    shape: ModelShape
    choices: tuple[Vector, ...]  # per layer the allowed groups, ascending
    known_vectors: Mapping[str, Vector] = field(default_factory=dict)  # published ones by name

    def __post_init__(self) -> None:
        layers, heads = self.shape.num_hidden_layers, self.shape.num_attention_heads
        if len(self.choices) != layers:
            raise ValueError(f"kv_groups lists {len(self.choices)} layers but num_hidden_layers is {layers}")
        divisors = [groups for groups in range(1, heads + 1) if heads % groups == 0]
        for layer, allowed in enumerate(self.choices):
            if wrong := set(allowed).difference(divisors):
                what = f"{min(wrong)} in layer {layer}, which does not divide the {heads} attention heads"
                raise ValueError(f"kv_groups has {what}; use any of {', '.join(map(str, divisors))}")
        for vector in self.known_vectors.values():
            self.check(vector)

    @property
    def largest(self) -> Vector:
        return tuple(allowed[-1] for allowed in self.choices)

    @property
    def smallest(self) -> Vector:
        return tuple(allowed[0] for allowed in self.choices)

    @property
    def middle(self) -> Vector:
        return tuple(allowed[(len(allowed) - 1) // 2] for allowed in self.choices)

    @property
    def size(self) -> int:
        """How many vectors the space holds."""
        return math.prod(map(len, self.choices))

    @property
    def levels(self) -> list[int]:
        """The groups that any layer may have, ascending."""
        return sorted(set().union(*self.choices))

    def uniform_vectors(self) -> list[Vector]:
        """The vectors with the same groups in every layer, fewest first."""
        common = set(self.choices[0]).intersection(*self.choices)
        return [(groups,) * len(self.choices) for groups in sorted(common)]

    def reference_vectors(self) -> dict[str, Vector]:
        """The vectors that every search evaluates first, by name: smallest, uniform, largest, then known ones."""
        uniform = {f"uniform {vector[0]}": vector for vector in self.uniform_vectors()}
        extremes = {"smallest": self.smallest, "largest": self.largest}
        extremes = {name: vector for name, vector in extremes.items() if vector not in uniform.values()}
        return extremes | uniform | dict(self.known_vectors)

    def check(self, vector: Sequence[int]) -> Vector:
        """Returns ``vector`` as a tuple, or refuses it if it is not of this space."""
        name, layers = f"vector {format_vector(vector)}", len(self.choices)
        if len(vector) != layers:
            fix = "give one number of groups per layer"
            raise UserError(f"{name} has {len(vector)} layers but space {self.name} has {layers}; {fix}")
        for layer, (groups, allowed) in enumerate(zip(vector, self.choices, strict=True)):
            if groups not in allowed:
                few = ", ".join(map(str, allowed))
                raise UserError(f"{name} has {groups} groups in layer {layer} but space {self.name} allows {few} there")
        return tuple(vector)

    def served_as(self, served: "SearchSpace") -> "SearchSpace":
        """``served`` with the known vectors of both; refuses one with other choices."""
        if self.choices == served.choices:
            return replace(served, known_vectors={**self.known_vectors, **served.known_vectors})
        ours, theirs = (f"{len(space.choices)} layers" for space in (self, served))
        if ours == theirs:
            pairs = enumerate(zip(self.choices, served.choices, strict=True))
            layer, pair = next((layer, pair) for layer, pair in pairs if pair[0] != pair[1])
            ours, theirs = (f"kv_groups {list(groups)} in layer {layer}" for groups in pair)
        fix = "take a space with the same number of layers and the same kv_groups in each"
        raise UserError(f"serve {served.name} has {theirs} but space {self.name} has {ours}; {fix}")

    def choice_indices(self, vectors: Iterable[Vector]) -> list[list[int]]:
        """For each vector, which of a layer's choices it has in every layer; checks the vectors."""
        return [[self.choices[layer].index(g) for layer, g in enumerate(self.check(vector))] for vector in vectors]

    def to_dict(self) -> dict[str, Any]:
        """The space as plain values, as its YAML file states it; `space_from_dict` reads it back."""
        return {
            **self.shape.to_dict(),
            "kv_groups": [list(allowed) for allowed in self.choices],
            "known_vectors": {name: format_vector(vector) for name, vector in self.known_vectors.items()},
        }


class Totals:
    """Vectors by their total of groups: how many there are of each total, and uniform draws among them.

    Layers drawn with equal odds crowd around the middle total; drawing the total first spreads vectors over the range.
    """

    def __init__(self, choices: Sequence[Vector]) -> None:
        self._choices = choices
        # ways[l][t]: in how many ways layers l, l + 1, … add up to t; floats, as 3^32 and more are odds to us
        self._ways = np.zeros((len(choices) + 1, sum(map(max, choices)) + 1))
        self._ways[-1, 0] = 1
        for layer in reversed(range(len(choices))):
            for groups in choices[layer]:
                self._ways[layer, groups:] += self._ways[layer + 1, :-groups]
        self.counts = self._ways[0]  # of vectors, by total
        self.reachable = np.flatnonzero(self.counts)  # ascending totals that some vector has

    def draw(self, totals: npt.ArrayLike, rng: np.random.Generator) -> list[Vector]:
        """One vector for each of n reachable ``totals``, uniform among the vectors of that total."""
        left = np.array(totals)
        columns = []
        for allowed, ways in zip(self._choices, self._ways[1:], strict=True):
            groups = np.array(allowed)
            remaining = left[:, None] - groups  # (n, choices)
            odds = np.cumsum(np.where(remaining >= 0, ways[remaining], 0.0), axis=1)
            picked = groups[(rng.random((len(left), 1)) * odds[:, -1:] >= odds).sum(axis=1).clip(max=len(groups) - 1)]
            left = left - picked
            columns.append(picked.tolist())
        return list(zip(*columns, strict=True))

    def draw_stratified(self, vectors: int, rng: np.random.Generator) -> list[Vector]:
        """Vectors whose totals lie one in each of ``vectors`` equal stretches of the range."""
        places = (np.arange(vectors) + rng.random(vectors)) / max(vectors, 1) * len(self.reachable)
        return self.draw(self.reachable[places.astype(int)], rng)


def space_from_dict(name: str, values: Mapping[str, Any]) -> SearchSpace:
    """Builds a space from the contents of a YAML file; a ValueError or UserError says what is wrong with these."""
    defaults = {item.name: item.default for item in fields(ModelShape)}
    known = [*defaults, "kv_groups", "known_vectors"]
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    required = ["kv_groups", *(key for key, default in defaults.items() if default is MISSING)]
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{', '.join(missing)} is missing; add it")
    shape = ModelShape(**{key: values[key] for key in values if key in defaults})
    stated = values["kv_groups"]
    nested = isinstance(stated, list) and any(isinstance(allowed, list) for allowed in stated)
    choices = stated if nested else [stated] * shape.num_hidden_layers
    if not all(isinstance(allowed, list) and allowed and {type(g) for g in allowed} == {int} for allowed in choices):
        raise ValueError(f"kv_groups is {stated!r}; give a list of whole numbers, or one such list per layer")
    named = values.get("known_vectors") or {}
    if not isinstance(named, dict):
        raise ValueError(f"known_vectors is {named!r}; give a vector such as 4-2-2-1 by name")
    vectors = {str(name): parse_vector(str(text)) for name, text in named.items()}
    return SearchSpace(name, shape, tuple(tuple(sorted(set(allowed))) for allowed in choices), vectors)


def searched_space(config: Mapping[str, Any]) -> tuple[SearchSpace, str]:
    """The space that a recorded search's costs are of, and a title that also names the one that its losses are of."""
    values = dict(config.get("serve") or config["space"])
    space, trained = space_from_dict(values.pop("name"), values), config["space"]["name"]
    return space, f"{space.name} (losses of {trained})" if config.get("serve") else space.name


def shipped_spaces() -> list[str]:
    """Names of the spaces that come with the package."""
    return sorted(path.stem for path in shipped("search_spaces").glob("*.yaml"))


def load_space(reference: str) -> SearchSpace:
    """A space by the name of a shipped one or by the path of a YAML file."""
    known = shipped_spaces()
    path = shipped("search_spaces") / f"{reference}.yaml" if reference in known else Path(reference)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        others = "the path of a .yaml file, or a trained model's directory"
        raise UserError(f"there is no search space '{reference}'; use {', '.join(known)}, {others}")
    try:
        # OmegaConf's YAML reads 1e-5 as a number, as JSON does
        values: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping of keys to values; see the shipped ones")
        return space_from_dict(path.stem, values)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, AssertionError) as error:
        raise UserError(f"search space {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, UserError) as error:
        raise UserError(f"search space {path}: {error}") from None
