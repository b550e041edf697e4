"""The recipes of docs/recipes.md, run as they stand on a small model."""

import json
import re
from pathlib import Path

import pytest

from nas.data.tokenizer import train_tokenizer
from nas.export.hf import HfExporter
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


def block(language: str) -> str:
    """The page's block in this language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_an_adapter_is_trained_by_trl_merged_and_generates(
    nas: Nas, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    monkeypatch.chdir(checkpoint.parent)
    exec(block("python"), {})  # the page is ours
    before, after = (HfExporter().read(folder) for folder in (checkpoint, Path("OUT/merged")))
    assert after.kv_heads == (4, 1, 2)
    moved = [name for name, tensor in after.state_dict().items() if not tensor.equal(before.state_dict()[name])]
    assert {name.split(".")[-2] for name in moved} == set(before.specs[0].linears)
    done = nas("generate", "checkpoint=OUT/merged", "prompt=import", "new_tokens=2")
    assert done.code == 0, done.err


def test_lm_evaluation_harness_evaluates_a_local_task(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(checkpoint.parent)
    Path("tasks").mkdir()
    Path("tasks/local.yaml").write_text(block("yaml"))
    tasks = TaskManager(include_path="tasks")
    options = f"pretrained={checkpoint},trust_remote_code=True"
    found = simple_evaluate("hf", model_args=options, tasks=["local"], task_manager=tasks, device="cpu")
    assert 0 < found["results"]["local"]["bits_per_byte,none"] < 20
