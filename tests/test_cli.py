"""The command line and the contracts: help, run directories, shipped configs, the wheel."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from nas import shipped
from nas.config import STAGES, register, to_stage
from nas.latency import this_device
from nas.metrics import COLUMNS
from nas.run import FinishedRun
from tests.conftest import Nas, Workspace

NEEDED = {
    "report": ["run=x"],
    "export": ["run=x"],
    "finetune": ["checkpoint=x"],
    "generate": ["checkpoint=x", "prompt=x"],
    "fidelity": ["supernet=x"],
}
SAMPLERS = ["front", "exhaustive", "nsga2", "random", "tpe"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("stage", "parts"),
    [(stage, []) for stage in STAGES]
    + [("train", ["data=text", "data.path=x"]), ("fidelity", ["data=hf"])]
    + [("search", [f"sampler={sampler}"]) for sampler in SAMPLERS]
    + [("export", ["export=[hf,gguf,modelopt,megatron,uniform,config]", "export.dtype=bf16"])],
)
def test_every_config_composes_into_its_dataclass(stage: str, parts: list[str]) -> None:
    register()
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        assert isinstance(to_stage(compose(stage, [*NEEDED.get(stage, []), *parts, "name=n"])), STAGES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_itself(nas: Nas, stage: str) -> None:
    result = nas(stage, "--help")
    assert result.code == 0
    assert f"nas {stage}" in result.out
    assert "runs_dir: runs" in result.out


def test_the_config_can_be_shown_and_budget_is_sugar(nas: Nas) -> None:
    for sugar in (["--budget", "77"], ["--budget=77"], ["budget=77"]):
        shown = nas("search", *sugar, "--cfg", "job").out
        assert "budget: '77'" in shown


def test_without_a_stage_the_usage_is_shown(nas: Nas) -> None:
    assert nas("--help").out.startswith("nas <stage>")
    assert nas().code == 2


def test_tab_completion_knows_stages_and_options(nas: Nas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "nas ")
    assert set(nas("-sc", "query=bash").out.split()) == set(STAGES)
    monkeypatch.setenv("COMP_LINE", "nas search sampler=")
    assert set(nas("-sc", "query=bash").out.split()) == {f"sampler={name}" for name in SAMPLERS}


def test_a_search_leaves_the_run_directory_of_the_contract(workspace: Workspace) -> None:
    run = workspace.runs / "search" / "base"
    info = json.loads((run / "run.json").read_text())
    assert {"argv", "config", "git", "versions", "device", "seeds", "parents", "started"} <= info.keys()
    assert info["device"]["cpu"]
    assert set(info["parents"]) == {"supernet", "latency"}
    assert FinishedRun(run).parent("supernet").info["stage"] == "train"
    assert FinishedRun(run).parent("latency").info["stage"] == "measure"
    assert info["config"]["device"]
    with (run / "front.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [*COLUMNS, "memory_gib", "ttft_ms", "paired_se_nats"]  # and, where they are known, more
    assert [float(row["loss_nats"]) for row in rows] == sorted(float(row["loss_nats"]) for row in rows)
    assert {row["on_front"] for row in rows} == {"True"}
    with (run / "trials.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 9
    train = FinishedRun(run).parent("supernet").info
    assert len(train["config"]["data"]["digest"]) == 64


def test_a_second_search_trains_and_measures_nothing_again(nas: Nas, workspace: Workspace) -> None:
    arguments = ("search", "--budget", 5, "sampler=random", *workspace.arguments)
    result = nas(*arguments, "name=second")
    assert result.code == 0, result.err
    assert "Training" not in result.out
    assert "Timing" not in result.out


def test_a_published_table_is_used_where_the_device_is_named(nas: Nas, workspace: Workspace) -> None:
    timing = (workspace.arguments[0], *workspace.arguments[-3:], "check=0")
    command = ("measure", *timing, "runs_dir=elsewhere", "name=m", "publish=latency_models")
    published = nas(*command)
    assert published.code == 0, published.err
    slug = this_device().slug
    (table,) = Path("latency_models").glob("*/*/table.csv")
    table.unlink()
    again = nas(*command)
    assert again.code == 0, again.err  # what was measured before can still be published
    assert table.read_bytes() == Path("elsewhere/measure/m/table.csv").read_bytes()
    named = ("workload.dtype=fp32", "workload.runtime=eager", f"device={slug}")
    (supernet,) = (workspace.runs / "train").glob("*/")
    arguments = (*workspace.arguments, *named, f"supernet={supernet}", "name=named")
    result = nas("search", "--budget", 4, *arguments)
    assert result.code == 0, result.err
    assert f"measured on {this_device().name}" in result.out
    assert set(pd.read_csv("runs/search/named/front.csv")["latency_source"]) == {"measured"}
    assert f"there is no device '{slug}x'" in nas("search", *arguments, f"device={slug}x").err


@pytest.mark.skipif("CI" not in os.environ, reason="builds and installs a wheel; set CI to run it")
def test_the_wheel_works_from_an_empty_directory(tmp_path: Path, workspace: Workspace) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("conf", "search_spaces", "latency_models"):
        shipped_files = {f"nas/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert shipped_files <= set(names)
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import nas; print(nas.__file__)"]
    printed = subprocess.run(where, cwd=empty, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(printed.strip()).is_relative_to(site)
    command = [sys.executable, "-m", "nas", "search", "--budget", "4", "name=w", *workspace.arguments]
    subprocess.run(command, cwd=empty, env=environment, check=True, capture_output=True)
    assert (empty / "runs" / "search" / "w" / "front.csv").is_file()
