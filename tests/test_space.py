"""Spaces and vectors: the shipped facts, parsing, validation, counting."""

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import UserError
from nas.shape import FEATURES
from nas.space import SearchSpace, format_vector, load_space, parse_vector, shipped_spaces, space_from_dict
from tests.conftest import MICRO


@pytest.mark.parametrize("name", list(shipped_spaces()))
def test_every_shipped_space_loads_and_survives_a_round_trip(name: str) -> None:
    space = load_space(name)
    again = space_from_dict(name, yaml.safe_load(yaml.safe_dump(space.to_dict())))
    assert again == space
    assert space.shape.intermediate_size % 256 == 0  # what inference engines round to


@pytest.mark.parametrize(
    ("name", "vector", "runs"),
    [
        ("decilm-6b", "DeciLM-6B", [(4, 1), (2, 9), (1, 20), (4, 2)]),
        ("decilm-7b", "DeciLM-7B", [(4, 5), (2, 5), (4, 1), (2, 9), (1, 11), (4, 1)]),
        ("decicoder-6b", "DeciCoder-6B", [(4, 1), (2, 3), (1, 11), (2, 1), (1, 15), (4, 1)]),
    ],
)
def test_published_vectors_are_stated_exactly(name: str, vector: str, runs: list[tuple[int, int]]) -> None:
    expected = tuple(itertools.chain.from_iterable([groups] * count for groups, count in runs))
    assert load_space(name).known_vectors[vector] == expected


def test_tiny_holds_the_product_of_its_choices() -> None:
    space = load_space("tiny")
    assert space.size == 3**8 == len(set(itertools.product(*space.choices)))


def test_reference_vectors_are_the_uniform_and_the_known_ones(micro: SearchSpace) -> None:
    assert micro.reference_vectors() == {
        "uniform 1": (1, 1, 1),
        "uniform 2": (2, 2, 2),
        "uniform 4": (4, 4, 4),
        "favourite": (4, 1, 2),
    }


def test_a_space_without_uniform_vectors_still_has_its_extremes(micro: SearchSpace) -> None:
    space = SearchSpace("mixed", micro.shape, ((1, 2), (4,), (2, 4)))
    assert space.reference_vectors() == {"smallest": (1, 4, 2), "largest": (2, 4, 4)}


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40))
def test_a_vector_survives_formatting_and_parsing(vector: list[int]) -> None:
    assert parse_vector(format_vector(vector)) == tuple(vector)


@pytest.mark.parametrize("text", ["", "4-", "a-b-c", "4,2,1", "4.0-2-1"])
def test_what_is_not_a_vector_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="vector"):
        parse_vector(text)


def test_groups_may_differ_by_layer(micro: SearchSpace) -> None:
    values = {**micro.to_dict(), "kv_groups": [[4, 2], [1], [2]], "known_vectors": {}}
    assert space_from_dict("own", values).choices == ((2, 4), (1,), (2,))


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (4.0, "rope_scaling is 4.0 but needs a rope_type, one of linear, llama3, yarn"),
        ({"factor": 4.0}, "needs a rope_type, one of linear, llama3, yarn"),
        ({"rope_type": "longrope", "factor": 4.0}, "needs a rope_type, one of linear, llama3, yarn"),
        ({"rope_type": "llama3", "factor": 4.0}, "lacks original_max_position_embeddings, low_freq_factor, high"),
        ({"rope_type": "linear", "factor": 4.0, "colour": 1}, "unknown key colour; remove it"),
        ({"rope_type": "linear", "factor": -1}, "rope_scaling.factor is -1 but must be a positive number"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1.5},
            "rope_scaling.original_max_position_embeddings is 1.5 but must be a positive integer",
        ),
    ],
)
def test_a_space_with_a_wrong_rope_scaling_is_refused(micro: SearchSpace, scaling: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        space_from_dict("mine", micro.to_dict() | {"rope_scaling": scaling})


def test_features_survive_a_round_trip_and_absent_ones_are_not_written(micro: SearchSpace) -> None:
    features = {"qkv_bias": True, "qk_norm": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    space = space_from_dict("own", micro.to_dict() | features)
    assert not set(FEATURES) & micro.to_dict().keys()
    assert {key: value for key, value in space.to_dict().items() if key in FEATURES} == features
    assert space_from_dict("own", yaml.safe_load(yaml.safe_dump(space.to_dict()))) == space


def test_a_number_may_be_written_as_json_writes_it(micro_file: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(micro_file.read_text() + "rms_norm_eps: 1e-05\n")
    assert load_space(str(tmp_path / "own.yaml")).shape.rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[1, 2, 4]", "[1, 3]", "kv_groups has 3 in layer 0, .* the 4 attention heads; use any of 1, 2, 4"),
        ("[1, 2, 4]", "[]", r"kv_groups is \[\]; give a list of whole numbers"),
        ("[1, 2, 4]", "4", "kv_groups is 4; give a list"),
        ("[1, 2, 4]", "[1, two]", r"kv_groups is \[1, 'two'\]; give a list of whole numbers"),
        ("[1, 2, 4]", "[1, [2]]", "kv_groups is .*, or one such list per layer"),
        ("[1, 2, 4]", "[[1], [1, [2]], [1]]", "kv_groups is .*, or one such list per layer"),
        ("[1, 2, 4]", "[[1], [2]]", "kv_groups lists 2 layers but num_hidden_layers is 3"),
        ("[1, 2, 4]", "[[1], [], [2]]", "kv_groups is .*, or one such list per layer"),
        ("head_dim: 8\n", "", "head_dim is missing; add it"),
        ("head_dim: 8\n", "head_dim: 8\ncolour: red\n", "unknown key colour; known are num_hidden_layers"),
        ("head_dim: 8\n", "head_dim: 7\n", "head_dim is 7 but rotary embeddings need an even one"),
        ("hidden_size: 32\n", "hidden_size: wide\n", "hidden_size is 'wide' but must be a positive integer"),
        ("4-1-2", "4-1", "vector 4-1 has 2 layers but space own has 3"),
        ("4-1-2", "4-1-3", "vector 4-1-3 has 3 groups in layer 2 but space own allows 1, 2, 4 there"),
        ("4-1-2", "four", "'four' is not a vector"),
        ("favourite: 4-1-2", "- 4-1-2", "known_vectors is .*; give a vector such as 4-2-2-1 by name"),
        ("[1, 2, 4]", "[1, 2", "is not valid YAML"),
        ("head_dim: 8\n", "head_dim: 8\n1: red\n", "unknown key 1; known are"),
        ("hidden_size: 32\n", "hidden_size: -32\n", "hidden_size is -32 but must be a positive integer"),
        (MICRO, "- 4-1-2", "it is not a mapping of keys to values"),
        (MICRO, "3", "is not valid YAML"),
        (MICRO, "\x00", "is not valid YAML"),
        (MICRO, "", "is missing; add it"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    (tmp_path / "own.yaml").write_text(MICRO.replace(old, new))
    with pytest.raises(UserError, match=f"own.yaml.*{words}"):
        load_space(str(tmp_path / "own.yaml"))


def test_a_space_that_is_not_there_is_refused() -> None:
    for reference in ("huge", "gone.yaml", "../tiny"):
        with pytest.raises(UserError, match=f"there is no search space '{reference}'; use .*tiny"):
            load_space(reference)
