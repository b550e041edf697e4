"""The recipes of docs/recipes.md, run as they stand on a small model."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from nas.data.tokenizer import train_tokenizer
from nas.export.hf import HfExporter
from nas.model.config_json import padded_ffn_width
from nas.space import SearchSpace
from tests.conftest import Nas, random_supernet

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


@pytest.fixture
def checkpoint(micro: SearchSpace, text_file: Path, tmp_path: Path) -> Path:
    """An exported model, beside DATA.jsonl."""
    lines = [line for line in text_file.read_text().splitlines() if len(line) > 20][:40]
    (tmp_path / "DATA.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    train_tokenizer([text_file.read_text()], 320).save(str(tmp_path / "tokenizer.json"))
    model = random_supernet(micro, spread=0.1).extract((4, 1, 2))
    HfExporter().write(model, tmp_path / "tokenizer.json", tmp_path / "CHECKPOINT", {})
    return tmp_path / "CHECKPOINT"


def block(heading: str, index: int = 0) -> str:
    """A block of code below a heading of the page."""
    (section,) = re.findall(rf"^## [^\n]*{heading}.*?(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return str(re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL)[index])


def test_trainer_trains_an_exported_model(nas: Nas, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    exec(block("transformers' Trainer"), {})  # the page is ours
    trained = HfExporter().read(Path("OUT/trained"))
    assert trained.kv_heads == (4, 1, 2)
    assert not trained.lm_head.weight.equal(HfExporter().read(checkpoint).lm_head.weight)
    done = nas("generate", "checkpoint=OUT/trained", "prompt=import", "new_tokens=2")
    assert done.code == 0, done.err


def test_an_adapter_is_trained_by_trl_merged_and_generates(
    nas: Nas, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    monkeypatch.chdir(checkpoint.parent)
    exec(block("SFTTrainer"), {})
    before, after = (HfExporter().read(folder) for folder in (checkpoint, Path("OUT/merged")))
    assert after.kv_heads == (4, 1, 2)
    moved = [name for name, tensor in after.state_dict().items() if not tensor.equal(before.state_dict()[name])]
    assert {name.split(".")[-2] for name in moved} == set(before.shape.layer(1).linears)
    done = nas("generate", "checkpoint=OUT/merged", "prompt=import", "new_tokens=2")
    assert done.code == 0, done.err


# What torchtitan 0.3.0 publishes: the names that its functions and classes take, those before the bar of necessity.
_INIT = "param_init sharding_config"
PUBLISHED = {
    "make_gqa_config": "dim n_heads wqkv_param_init wo_param_init inner_attention rope"
    " | n_kv_heads head_dim fuse_qkv qk_norm tp_gemm_backend",
    "make_ffn_config": "dim hidden_dim w1_param_init w2w3_param_init | tp_gemm_backend",
    "CosSinRoPE": f"dim max_seq_len | theta scaling scaling_factor {_INIT}",
    "Embedding": f"num_embeddings embedding_dim | {_INIT}",
    "Linear": f"in_features out_features | bias {_INIT}",
    "RMSNorm": f"normalized_shape | eps elementwise_affine {_INIT}",
    "Llama3TransformerBlock": f"attention attention_norm ffn_norm | feed_forward moe {_INIT}",
    "Llama3Model": f"dim vocab_size lm_head tok_embeddings norm layers | enable_weight_tying {_INIT}",
}


def published(name: str) -> Any:
    """Takes what torchtitan's own takes, as ``name(…)`` and ``name.Config(…)``, and returns it."""
    needed, _, more = (names.split() for names in PUBLISHED[name].partition("|"))

    def take(**given: Any) -> SimpleNamespace:
        assert set(needed) <= given.keys() <= {*needed, *more}
        return SimpleNamespace(**given)

    take.Config = take  # type: ignore[attr-defined]
    return take


def test_torchtitans_list_of_layers_follows_what_it_publishes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    head, _, _ = block("torchtitan").partition("model = config.build()")
    code = re.sub(r"^from torchtitan.*\n", "", head, flags=re.MULTILINE)
    names: dict[str, Any] = {name: published(name) for name in PUBLISHED} | {"get_attention_config": str}
    exec(code, names)
    config, shape = names["config"], HfExporter().read(checkpoint).shape
    assert [layer.attention.n_kv_heads for layer in config.layers] == [4, 1, 2]
    for layer in config.layers:
        assert (layer.attention.n_heads, layer.attention.head_dim) == (shape.num_attention_heads, shape.head_dim)
        assert layer.attention.dim == layer.feed_forward.dim == layer.ffn_norm.normalized_shape == config.dim
        assert layer.feed_forward.hidden_dim == padded_ffn_width(shape.intermediate_size)


def test_torchtitan_computes_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchtitan")
    from torchtitan.models.common.attention import ScaledDotProductAttention

    monkeypatch.chdir(checkpoint.parent)
    code = block("torchtitan").replace('get_attention_config("flex")', "attention_on_a_cpu")
    exec(code, names := {"attention_on_a_cpu": ScaledDotProductAttention.Config()})
    ids = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    model = HfExporter().read(checkpoint).eval()
    torch.testing.assert_close(names["model"](ids), model(ids), rtol=0, atol=1e-5)


def test_the_leaderboards_tasks_are_those_that_the_harness_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval.config.evaluate_config import EvaluatorConfig

    monkeypatch.chdir(tmp_path)
    Path("openllm.yaml").write_text(block("Benchmarks"))
    config = EvaluatorConfig.from_config("openllm.yaml")
    config.process_tasks()
    assert config.tasks == ["openllm"]
    group = yaml.safe_load((Path(tasks.__file__).parent / "benchmarks/openllm.yaml").read_text())
    shots = {task["task"]: task["num_fewshot"] for task in group["task"]}
    for name, shown in re.findall(r"(ARC|HellaSwag|MMLU|TruthfulQA|Winogrande|GSM8K) (\d+)", PAGE):
        assert shots.pop({"ARC": "arc_challenge"}.get(name, name.lower())) == int(shown)
    assert not shots


def test_lm_evaluation_harness_evaluates_a_local_task(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(checkpoint.parent)
    Path("tasks").mkdir()
    Path("tasks/local.yaml").write_text(block("Benchmarks", 1))
    tasks = TaskManager(include_path="tasks")
    options = f"pretrained={checkpoint},trust_remote_code=True"
    found = simple_evaluate("hf", model_args=options, tasks=["local"], task_manager=tasks, device="cpu")
    assert 0 < found["results"]["local"]["bits_per_byte,none"] < 20
