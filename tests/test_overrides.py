"""From the words of a command line to what a config then holds."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nas import shipped
from nas.config import register
from nas.overrides import to_hydra


def held(stage: str, *words: str) -> object:
    """What the key of the last word holds then."""
    register()
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        config = compose(stage, to_hydra(stage, words))
    return OmegaConf.select(config, words[-1].partition("=")[0].lstrip("+"))


@pytest.mark.parametrize("text", ["2025_11_28", "1e3", "007", "1.50", "true", "[a]", "-5", "null", "inf", "1_000"])
def test_a_text_that_looks_like_something_else_stays_as_typed(text: str) -> None:
    assert held("train", f"name={text}") == text


@pytest.mark.parametrize(
    "text", ["p/[data]/text.txt", "[data]", "ünï x", "it's.txt", "a(1).txt", "a=b.txt", "123", "{a}"]
)
@pytest.mark.parametrize("key", ["data.path", "init.checkpoint", "tokenizer"])
def test_a_path_is_a_path_whatever_its_characters(key: str, text: str) -> None:
    assert held("train", "data=text", f"{key}={text}") == text


def test_a_part_that_one_swaps_knows_its_own_types() -> None:
    assert held("train", "data=hf", "data.revision=7e12345") == "7e12345"
    assert held("train", "data=hf", "data.max_mb=1e1") == 10
    assert held("search", "sampler=nsga2", "sampler.population_size=1e2") == 100


def test_the_home_directory_may_be_written_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert held("train", "tokenizer=~/a b") == str(Path("/home/me/a b"))


def test_init_alone_is_the_checkpoint() -> None:
    for word in ("init=1e3", "init.checkpoint=1e3"):
        assert to_hydra("search", [word]) == ['init.checkpoint="1e3"']
    assert to_hydra("fidelity", ["init=1e3"]) == ['init="1e3"']


@pytest.mark.parametrize(
    ("stage", "word", "value"),
    [
        ("train", "train.steps=1e2", 100),
        ("search", "workload.batch=2e1", 20),
        ("search", "measure.batches=[1e1,4]", [10, 4]),
        ("train", "train.learning_rate=1e-3", 1e-3),
        ("train", "tokenizer=null", None),
        ("search", "budget=200", "200"),
        ("search", "objectives=[loss_nats,decode_ms]", ["loss_nats", "decode_ms"]),
        ("search", "objectives=loss_nats,decode_ms", ["loss_nats", "decode_ms"]),
    ],
)
def test_a_number_is_one_where_a_number_is_wanted(stage: str, word: str, value: object) -> None:
    assert held(stage, word) == value


def test_each_value_of_a_sweep_is_typed() -> None:
    words = to_hydra("train", ["-m", "name=2025_11_28,1e3", "train.steps=1e2,200", "seed=range(1,3)", "init=a,b"])
    assert {'name="2025_11_28","1e3"', "train.steps=100,200", "seed=range(1,3)", "init.checkpoint=a,b"} <= set(words)
    assert "hydra.job.config.override_dirname.exclude_keys=[]" in words


@given(st.text(st.one_of(st.sampled_from("\\\"'${}[](), =\n\t:"), st.characters(codec="utf-8"))))
@example('\\${a}\\"\\')
def test_a_prompt_reaches_the_config_as_it_was_typed(text: str) -> None:
    (word,) = to_hydra("generate", [f"prompt={text}"])
    config = OmegaConf.create({"prompt": "another"})
    OmegaConf.update(config, "prompt", OverridesParser.create().parse_override(word).value())
    assert config.prompt == text


@pytest.mark.parametrize("word", ["seed=0,1", "x=[1,2]", "budget=all", "x=null", "+a.b=1", "~x", 'name="ünï"', "--cfg"])
def test_hydras_own_language_stays_as_it_is(word: str) -> None:
    assert to_hydra("search", [word]) == [word]
