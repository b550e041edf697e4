"""nas finetune of a whole front: the same as vector by vector, resumed where it was stopped, and what it compares."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import sem
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from nas.export.hf import HfExporter
from nas.files import read_json
from nas.model.pretrained import read_checkpoint
from nas.ranking import TRAINED, compare_trained, order_sentence
from nas.run import Run
from nas.space import SearchSpace, format_vector
from tests.conftest import Nas, Workspace, random_supernet, read_metrics
from tests.helpers import TRAINING, check_refusal


@pytest.fixture
def front(nas: Nas, workspace: Workspace) -> Path:
    """An export run of the searched front."""
    assert nas("export", "run=runs/search/base", "name=front").code == 0
    return workspace.runs / "export/front"


def test_a_front_is_trained_like_its_vectors_one_by_one_though_it_was_interrupted(
    nas: Nas, workspace: Workspace, front: Path, micro: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ("data=text", workspace.arguments[2])
    command = ("finetune", f"run={front}", *data, *TRAINING, "train.learning_rate=3e-3")
    names = sorted(folder.name for folder in front.glob("*/"))
    killed, second, log = workspace.runs / "finetune/killed", names[1], Run.log

    def interrupted(run: Run, **values: object) -> None:
        if run.path.name == second and values["step"] == 5:  # after the checkpoint of step 4
            raise KeyboardInterrupt
        log(run, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        assert nas(*command, "name=killed").code == 1
    first = (killed / names[0] / "model.safetensors").stat().st_mtime_ns
    done = nas(*command, "name=killed")
    assert done.code == 0, done.err
    assert "Kendall's τ of inherited and trained losses" in done.out
    assert names[0] not in done.out  # it was finished
    steps = [entry["step"] for entry in read_metrics(killed / "trainings" / second) if "loss_nats" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]  # it went on from its checkpoint
    assert (killed / names[0] / "model.safetensors").stat().st_mtime_ns == first
    assert not list(killed.rglob("checkpoint.pt"))
    table = pd.read_csv(killed / "front_trained.csv")
    assert list(table.columns[: len(TRAINED)]) == TRAINED
    assert set(table["vector"]) == {format_vector(HfExporter().read(front / name).kv_heads) for name in names}

    alone = nas("finetune", f"checkpoint={front / second}", *command[2:], "name=alone")
    assert alone.code == 0, alone.err
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (killed / second, workspace.runs / "finetune/alone/model")
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    row = table.set_index("vector").loc[second]
    assert f"{row['loss_before_nats']:.4f} before, {row['loss_after_nats']:.4f} after" in alone.out
    assert nas("generate", f"checkpoint={killed / second}", "prompt=import", "new_tokens=2", "name=text").code == 0

    taught = nas(
        "finetune", f"checkpoint={front / second}", f"distill={front / names[0]}", *data, *TRAINING, "name=taught"
    )
    assert taught.code == 0, taught.err
    assert read_json(workspace.runs / "finetune/taught/run.json")["config"]["distill"] == {
        **read_checkpoint(front / names[0]).identity,
        "weight": 1.0,
        "temperature": 1.0,
    }
    assert f"| distilled from | {names[0]} (" in (workspace.runs / "finetune/taught/model/README.md").read_text()
    other = random_supernet(SearchSpace("other", dataclasses.replace(micro.shape, vocab_size=330), micro.choices))
    HfExporter().write(other.extract(micro.smallest), None, workspace.path / "other", {})
    strange = nas("finetune", f"checkpoint={front / second}", "distill=other", *data, *TRAINING, "name=strange")
    check_refusal(strange, ["distill=other", "330 tokens", "(320)", "same tokenizer"])

    unknown = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer = Tokenizer(BPE())
    tokenizer.train_from_iterator(["another text, other merges"] * 9, unknown)
    tokenizer.save(str(workspace.path / "other.json"))
    own = f"checkpoint={front / second}"
    for command in (("finetune", own), ("train", f"init={front / second}")):
        refused = nas(*command, *data, "tokenizer=other.json", *TRAINING, "name=refused")
        check_refusal(refused, ["other.json has another vocabulary", "trained weights", "leave tokenizer= out"])
    fresh = nas("finetune", own, *data, "tokenizer=other.json", "from_scratch=true", *TRAINING, "name=fresh")
    assert fresh.code == 0, fresh.err

    report = ("report", "run=runs/search/base")
    reported = nas(*report, f"trained={killed}", "name=both")
    assert reported.code == 0, reported.err
    assert order_sentence(table) in reported.out
    assert Image.open(workspace.runs / "report/both/front_trained.png").width > 500
    page = (workspace.runs / "report/both/report.html").read_text()
    sentence = order_sentence(table).partition("'s ")[2]
    assert all(words in page for words in (sentence, "loss_after_nats", "trained loss, rank"))
    check_refusal(nas(*report, "trained=runs/finetune/alone"), ["trained one checkpoint=", "run=EXPORT_RUN"])
    shutil.copytree(workspace.runs / "search/base", workspace.runs / "search/other")
    mark = workspace.runs / "search/other/complete.json"
    mark.write_text(mark.read_text() + "\n")
    check_refusal(nas("report", "run=runs/search/other", f"trained={killed}"), ["trained vectors of", "search/base"])


@given(st.integers(2, 6), st.integers(2, 9), st.integers(0, 2**20))
def test_flips_ranks_and_errors_are_those_of_pair_by_pair(vectors: int, windows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    common = generator.normal(size=windows)
    before, after = (
        common + generator.normal(0.3, size=(vectors, 1)) + 0.3 * generator.normal(size=(vectors, windows))
        for _ in range(2)
    )
    table = compare_trained([str(vector) for vector in range(vectors)], before, after)
    assert table["loss_before_nats"].is_monotonic_increasing
    first = int(table["vector"][0])
    flips, clear = 0, 0
    for row in table.to_dict("records"):
        own, others = int(row["vector"]), [other for other in range(vectors) if other != int(row["vector"])]
        changed = [
            other for other in others if (before[own] - before[other]).mean() * (after[own] - after[other]).mean() < 0
        ]
        sure = [
            other
            for other in changed
            if all(abs((x[own] - x[other]).mean()) > 2 * sem(x[own] - x[other]) for x in (before, after))
        ]
        assert (row["flips"], row["flips_beyond_noise"]) == (len(changed), len(sure))
        for when, losses in (("before", before), ("after", after)):
            assert row[f"rank_{when}"] == 1 + sum(losses[other].mean() < losses[own].mean() for other in others)
            assert row[f"loss_{when}_nats"] == pytest.approx(losses[own].mean())
            assert row[f"se_{when}_nats"] == pytest.approx(sem(losses[own] - losses[first]), abs=1e-7)
        flips, clear = flips + len(changed), clear + len(sure)
    pairs = vectors * (vectors - 1) // 2
    words = f": {flips // 2} of {pairs} pairs of vectors changed their order, {clear // 2} of them"
    assert words in order_sentence(table)


def test_a_single_window_tells_no_noise() -> None:
    table = compare_trained(["1", "2"], np.array([[1.0], [2.0]]), np.array([[2.0], [1.0]]))
    assert table["flips"].tolist() == [1, 1]
    assert table["flips_beyond_noise"].tolist() == [0, 0]


@pytest.mark.usefixtures("workspace")
def test_one_model_or_a_run_is_asked_for(nas: Nas) -> None:
    for words in ((), ("run=runs/export/x", "checkpoint=runs/export/x/4-4-4")):
        check_refusal(nas("finetune", *words), ["give either checkpoint=", "run="])
    check_refusal(nas("finetune", "run=runs/search/base"), ["written by 'nas search'", "give a run of 'nas export'"])
    assert nas("export", "run=runs/search/base", "select=knee", "export=gguf", "name=other").code == 0
    check_refusal(nas("finetune", "run=runs/export/other"), ["no models in Hugging Face's format", "export=hf"])
    check_refusal(nas("finetune", "run=runs/export/other", "from_scratch=true"), ["from_scratch=true", "checkpoint="])
