"""Searches whose losses come from one space and whose costs come from another, and what is made of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from nas.config import CostConfig
from nas.errors import UserError
from nas.export.hf import HfExporter
from nas.latency import find_device
from nas.latency.cost import cost_function
from nas.latency.estimate import RooflineLatency
from nas.latency.predictor import Workload
from nas.space import SearchSpace, load_space, parse_vector, space_from_dict
from tests.conftest import MICRO, Nas, Workspace
from tests.helpers import TRAINING, check_refusal

SERVED = """\
num_hidden_layers: 3
hidden_size: 96
num_attention_heads: 8
head_dim: 12
intermediate_size: 200
vocab_size: 400
max_position_embeddings: 64
kv_groups: [1, 2, 4]
known_vectors:
  published: 2-1-4
"""
A10G = ("device=nvidia-a10g", "workload.batch=max", "workload.memory_gib=0.14", "workload.context=48")


@pytest.fixture
def served(workspace: Workspace) -> SearchSpace:
    """A larger space of as many layers and the same choices, in served.yaml of the working directory."""
    (workspace.path / "served.yaml").write_text(SERVED)
    return load_space(str(workspace.path / "served.yaml"))


def arguments(workspace: Workspace, *more: str) -> list[str]:
    """A search of the workspace's space, served as served.yaml on a card that is not at hand."""
    kept = [word for word in workspace.arguments if not word.startswith("workload.")]
    return ["search", *kept, "serve=served.yaml", *A10G, *more]


def config_of(run: str) -> dict[str, Any]:
    return dict(json.loads(Path("runs", run, "run.json").read_text())["config"])


def test_losses_are_the_proxys_and_every_cost_the_served_shapes(
    nas: Nas, workspace: Workspace, served: SearchSpace
) -> None:
    result = nas(*arguments(workspace, "budget=12", "name=mine", "cost.price_per_hour=2"))
    assert result.code == 0, result.err
    assert "27 vectors of served (losses of micro)" in result.out
    trials = pd.read_csv("runs/search/mine/trials.csv").set_index("vector")
    base = pd.read_csv("runs/search/base/trials.csv").set_index("vector")
    assert trials.index[:5].tolist() == ["1-1-1", "2-2-2", "4-4-4", "4-1-2", "2-1-4"]  # both spaces' known vectors
    both = trials.index.intersection(base.index)
    assert len(both) >= 4  # uniform and known ones
    np.testing.assert_allclose(trials["loss_nats"][both], base["loss_nats"][both], atol=1e-6)

    config = config_of("search/mine")
    assert config["space"]["name"] == "micro"
    assert config["space"]["known_vectors"] == {"favourite": "4-1-2"}
    recorded = dict(config["serve"])
    assert recorded.pop("name") == "served"
    assert space_from_dict("served", recorded).shape == served.shape
    workload = Workload(**config["workload"])
    assert (workload.context, workload.prompt) == (48, 24)  # beyond the proxy's context of 32

    device = find_device("nvidia-a10g")
    latency = RooflineLatency(device, served.shape, "bf16", "none")
    costs = cost_function(served, device, latency, workload, CostConfig(price_per_hour=2))
    for vector, row in trials.iterrows():
        groups, expected = parse_vector(str(vector)), costs(parse_vector(str(vector)))
        assert row[list(expected)].to_dict() == pytest.approx(expected)
        layers = 3 * (2 * 96 * 96 + 3 * 96 * 200 + 2 * 96) + sum(groups) * 2 * 96 * 12
        assert row["parameters"] == 2 * 400 * 96 + 96 + layers
        assert row["kv_bytes_per_token"] == 2 * 2 * 12 * sum(groups)
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["decode_ms"])
        assert row["memory_gib"] <= 0.14
    assert trials["batch"].nunique() > 2

    report = nas("report", "run=runs/search/mine", "name=mine")
    assert report.code == 0, report.err
    assert "served (losses of micro); batch max in 0.14 GiB, context 48" in report.out
    assert Image.open("runs/report/mine/front.png").info["Title"] == "served (losses of micro): Pareto front"
    together = nas("report", "run=runs/search", "name=together")
    assert "differ in serve; report each alone" in together.err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("num_hidden_layers: 3", "num_hidden_layers: 4", "serve own has 4 layers but space micro has 3 layers; take a"),
        (
            "[1, 2, 4]",
            "[[1, 2, 4], [1, 2], [1, 2, 4]]",
            r"has kv_groups \[1, 2\] in layer 1 but .* \[1, 2, 4\] in layer",
        ),
    ],
)
def test_a_served_space_with_other_layers_or_choices_is_refused(
    micro: SearchSpace, tmp_path: Path, old: str, new: str, words: str
) -> None:
    (tmp_path / "own.yaml").write_text(MICRO.partition("known_vectors")[0].replace(old, new))
    with pytest.raises(UserError, match=words):
        micro.served_as(load_space(str(tmp_path / "own.yaml")))


@pytest.mark.usefixtures("served")
def test_what_cannot_be_served_is_refused_before_anything_is_trained(nas: Nas, workspace: Workspace) -> None:
    for change, words in (
        ("serve=tiny", ["serve tiny has 8 layers", "micro has 3"]),
        ("workload.context=65", ["workload.context is 65", "64"]),
        ("constraints.max_parameters=10", ["constraints.max_parameters is 10", "a vector of served comes is"]),
    ):
        check_refusal(nas(*arguments(workspace, "name=none", "train.steps=7", change)), words)
    assert len(list(workspace.runs.glob("train/*"))) == 1
    assert not (workspace.runs / "search" / "none").exists()


@pytest.mark.usefixtures("served")
def test_a_search_goes_on_with_the_space_that_it_was_begun_to_serve(nas: Nas, workspace: Workspace) -> None:
    command = arguments(workspace, "budget=8", "name=mine")
    assert nas(*command).code == 0
    folder = workspace.runs / "search" / "mine"
    before = (folder / "trials.csv").read_bytes()
    for name in ("complete.json", "trials.csv", "front.csv"):
        (folder / name).unlink()
    other = workspace.path / "other.yaml"
    other.write_text(SERVED.replace("intermediate_size: 200", "intermediate_size: 256"))
    refused = nas(*command, "serve=other.yaml")
    check_refusal(refused, ["begun with another config (serve.name was served, now other; serve.intermediate_size was"])
    check_refusal(nas(*command, "serve=null", "workload.context=32"), ["begun with another config", "serve was"])
    assert nas(*command).code == 0
    assert (folder / "trials.csv").read_bytes() == before


@pytest.mark.usefixtures("served")
def test_workers_agree_on_what_is_served_and_measure_that(nas: Nas, workspace: Workspace) -> None:
    (workspace.path / "other.yaml").write_text(SERVED.replace("vocab_size: 400", "vocab_size: 401"))
    pool = ("budget=8", "sampler=random", f"storage=sqlite:///{workspace.path}/db", "name=pool")
    search = ("search", *pool, *workspace.arguments, "check=0")
    result = nas(*search, "serve=served.yaml", "workers=2")
    assert (result.code, result.err) == (0, "")
    trials = pd.read_csv("runs/search/pool/trials.csv")
    assert trials["vector"].nunique() == len(trials) == 8
    assert set(trials["latency_source"]) == {"measured"}
    (latency,) = Path("runs/measure").glob("served-*")
    assert config_of(f"measure/{latency.name}")["space"]["hidden_size"] == 96
    for serve in ("other.yaml", "null"):
        refused = nas(*search, f"serve={serve}", "runs_dir=elsewhere")
        check_refusal(refused, ["was begun with another space", "micro", "served as served"])
    (supernet,) = workspace.runs.glob("train/*")
    joined = nas(*search, "serve=served.yaml", "runs_dir=elsewhere", f"supernet={supernet}", f"latency={latency}")
    assert joined.code == 0, joined.err


def test_configurations_of_the_served_shape_are_trained_from_the_start(
    nas: Nas, workspace: Workspace, served: SearchSpace
) -> None:
    assert nas(*arguments(workspace, "budget=6", "name=mine")).code == 0
    (supernet,) = workspace.runs.glob("train/*")
    (supernet / "supernet.safetensors").unlink()  # is not needed
    result = nas("export", "run=runs/search/mine", "select=2-1-4", "export=config", "name=mine")
    assert result.code == 0, result.err
    folder = workspace.runs / "export" / "mine" / "2-1-4"
    assert not list(folder.glob("*.safetensors"))
    card = (folder / "README.md").read_text()
    assert all(words in card for words in ("no weights", "| losses are of | micro |", "| costs are of | served |"))

    read = HfExporter().read(folder, with_weights=False)
    assert (read.shape, read.kv_heads) == (served.shape, (2, 1, 4))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.hidden_size, config.num_key_value_heads_per_layer) == (96, [2, 1, 4])
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.model.layers[1].self_attn.k_proj.weight.shape == (12, 96)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 320 < config.vocab_size

    data = (*TRAINING, "data=text", workspace.arguments[2])
    check_refusal(nas("finetune", f"checkpoint={folder}", *data), ["has no model.safetensors", "from_scratch=true"])
    trained = nas("finetune", f"checkpoint={folder}", "from_scratch=true", *data, "name=scratch")
    assert trained.code == 0, trained.err
    made = workspace.runs / "finetune" / "scratch" / "model"
    assert HfExporter().read(made).shape == served.shape
    assert AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True).config.vocab_size == 400


def test_a_tokenizer_that_the_served_vocabulary_cannot_hold_stays_behind(nas: Nas, workspace: Workspace) -> None:
    (workspace.path / "served.yaml").write_text(SERVED.replace("vocab_size: 400", "vocab_size: 300"))
    assert nas(*arguments(workspace, "budget=6", "name=mine")).code == 0
    result = nas("export", "run=runs/search/mine", "select=fastest", "export=config", "name=mine")
    assert result.code == 0
    assert "tokenizer is left out: its 320 tokens exceed the served vocab_size of 300" in result.err
    (folder,) = workspace.runs.glob("export/mine/*/")
    assert not (folder / "tokenizer.json").exists()
    data = (*TRAINING, "data=text", workspace.arguments[2])
    trained = nas("finetune", f"checkpoint={folder}", "from_scratch=true", *data, "name=scratch")
    assert trained.code == 0, trained.err
    made = workspace.runs / "finetune" / "scratch" / "model" / "tokenizer.json"
    assert Tokenizer.from_file(str(made)).get_vocab_size() == 300
    other = nas(
        "finetune",
        f"checkpoint={folder}",
        "from_scratch=true",
        *data,
        f"tokenizer={workspace.runs}/train",
        "name=other",
    )
    check_refusal(other, ["tokenizer", "cannot be read"])


def test_models_of_many_layers_get_folders_that_transformers_can_load(
    nas: Nas, workspace: Workspace, micro_file: Path
) -> None:
    deep = micro_file.read_text().partition("known")[0].replace("num_hidden_layers: 3", "num_hidden_layers: 32")
    (workspace.path / "deep.yaml").write_text(deep)
    deep_search = arguments(workspace, "space=deep.yaml", "serve=null", "workload.context=32", "workload.memory_gib=1")
    assert nas(*deep_search, "budget=2", "sampler=random", "name=deep").code == 0
    assert nas("export", "run=runs/search/deep", "select=fastest", "export=config", "name=deep").code == 0
    (folder,) = workspace.runs.glob("export/deep/*/")
    assert folder.name == "_".join(32 * "1")
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 32  # its own space's shape
