"""Many workers on one study: one budget, no vector twice, and whatever is killed at whatever moment."""

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import psutil
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from nas.errors import UserError
from nas.search import Storage, search
from nas.search import storage as storage_module
from nas.search.problem import Budget
from nas.space import Vector, load_space
from tests.conftest import Nas
from tests.helpers import PROCESSES
from tests.search_problem import SAMPLERS, TWO, additive_loss, problem, work

HEARTBEAT_S = 0.3  # a worker counts as dead after 1.8 s
Loss = Callable[[Vector], float]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search looks often at what others evaluate, also in this process."""
    monkeypatch.setattr("nas.search.study._POLL_S", 0.05)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server without a database's name, on a socket in a temporary directory."""
    package = importlib.util.find_spec("pgserver")  # not imported: as root it would add a user to this machine
    if package is None or package.origin is None:
        pytest.skip("there is no wheel of pgserver for this Python on this machine")
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    for part in Path(package.origin).parents[1].glob("pgserver*"):  # to where every user can read them
        shutil.copytree(part, folder / part.name)
    programs, data = folder / "pgserver" / "pginstall" / "bin", folder / "data"
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # as which PostgreSQL refuses to run
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    options: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    initdb: list[str | Path] = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust"]
    subprocess.run([*initdb, "-E", "UTF8", "--no-locale", "--no-sync"], check=True, **options)
    process = subprocess.Popen([programs / "postgres", "-D", data, "-k", folder, "-h", "", "-F"], **options)
    try:
        yield f"postgresql://postgres@/%s?host={folder}"
    finally:
        process.send_signal(signal.SIGINT)  # "fast": without waiting for clients
        process.wait(30)
        shutil.rmtree(folder)


_NUMBERS = itertools.count()


@pytest.fixture
def postgresql(server: str) -> Storage:
    """A study in an empty PostgreSQL database."""
    engine = sqlalchemy.create_engine(f"postgresql+psycopg2{server.removeprefix('postgresql')}" % "postgres")
    name = f"test_{next(_NUMBERS)}"
    while True:
        with suppress(sqlalchemy.exc.OperationalError):  # the server is starting
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
            break
        time.sleep(0.05)
    engine.dispose()
    return Storage(server % name, heartbeat_s=HEARTBEAT_S)


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A new study in either database."""
    if request.param == "sqlite":
        return Storage.file(tmp_path / "study.db", HEARTBEAT_S)
    found: Storage = request.getfixturevalue("postgresql")
    return found


def start(storage: Storage, budget: int, folder: Path, name: str, **options: Any) -> ForkServerProcess:
    """Starts a worker in a process of its own."""
    process = PROCESSES.Process(target=work, args=(storage, budget, folder, name), kwargs=options)
    process.start()
    return process


def end(*processes: ForkServerProcess) -> list[int | None]:
    """Waits for workers; returns their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def evaluated(folder: Path, name: str) -> list[str]:
    """The vectors that a worker began to evaluate so far."""
    log = folder / f"{name}.log"
    return log.read_text().splitlines() if log.exists() else []


def begun(folder: Path, name: str) -> None:
    """Waits until a worker has begun its first evaluation."""
    while not evaluated(folder, name):
        time.sleep(0.01)


def agreed(folder: Path, *names: str) -> list[str]:
    """The vectors, each once, of the result that some workers agree on."""
    assert len({(folder / f"{name}.csv").read_bytes() for name in names}) == 1
    vectors = pd.read_csv(folder / f"{names[0]}.csv")["vector"]
    assert vectors.is_unique
    return list(vectors)


def join(storage: Storage, budget: int, loss: Loss = additive_loss, **options: Any) -> pd.DataFrame:
    """A worker in this process."""
    asked = problem(load_space("tiny")), loss, SAMPLERS["random"], Budget(budget), 0
    return search(*asked, storage, running="ignore", **options)


def study_of(storage: Storage) -> optuna.Study:
    """The study as the workers see it."""
    return storage.open(TWO, optuna.samplers.RandomSampler(), {})


def running(storage: Storage) -> list[FrozenTrial]:
    """The trials of a study that still run."""
    return study_of(storage).get_trials(states=(TrialState.RUNNING,))


def test_workers_share_a_budget_and_agree_on_the_result(postgresql: Storage, tmp_path: Path) -> None:
    patient = replace(postgresql, heartbeat_s=10.0)  # a busy machine can hold a worker up for longer than two seconds
    assert end(*(start(patient, 15, tmp_path, name, pause_s=0.02) for name in "abc")) == [0] * 3
    vectors = agreed(tmp_path, *"abc")
    assert len(vectors) == 15
    shares = [evaluated(tmp_path, name) for name in "abc"]
    assert all(shares)
    assert set(itertools.chain(*shares)) == set(vectors)
    assert sum(map(len, shares)) <= 15 + 2


def test_another_worker_evaluates_what_a_killed_one_was_at(storage: Storage, tmp_path: Path) -> None:
    doomed = start(storage, 12, tmp_path, "doomed", pause_s=60)
    begun(tmp_path, "doomed")
    others = [start(storage, 12, tmp_path, name) for name in "ab"]
    begun(tmp_path, "a")
    doomed.kill()
    assert end(doomed, *others) == [-signal.SIGKILL, 0, 0]
    assert len(agreed(tmp_path, "a", "b")) == 12
    assert set(evaluated(tmp_path, "doomed")) < {*evaluated(tmp_path, "a"), *evaluated(tmp_path, "b")}
    assert not running(storage)


def test_a_worker_that_is_slow_is_not_taken_for_dead(tmp_path: Path) -> None:
    storage = Storage.file(tmp_path / "study.db", HEARTBEAT_S)
    slow = start(storage, 9, tmp_path, "slow", pause_s=9 * HEARTBEAT_S)
    begun(tmp_path, "slow")
    assert end(start(storage, 9, tmp_path, "fast"), slow) == [0, 0]
    vectors = agreed(tmp_path, "slow", "fast")
    assert sorted(evaluated(tmp_path, "slow") + evaluated(tmp_path, "fast")) == sorted(vectors)


def test_a_search_killed_many_times_equals_one_without_a_break(tmp_path: Path) -> None:
    alone: dict[str, Any] = {"sampler": "front", "running": "fail"}
    whole = start(Storage.file(tmp_path / "whole.db"), 12, tmp_path, "whole", **alone)
    storage, moments = Storage.file(tmp_path / "killed.db"), (15, 90, 60, 41)
    for dies_at in moments:
        assert end(start(storage, 12, tmp_path, "killed", **alone, dies_at=dies_at)) == [-signal.SIGKILL]
    assert len(evaluated(tmp_path, "killed")) > 2
    assert end(start(storage, 12, tmp_path, "killed", **alone), whole) == [0, 0]
    agreed(tmp_path, "killed", "whole")
    assert len(evaluated(tmp_path, "killed")) <= 12 + len(moments)  # a kill costs one evaluation at most
    assert not running(storage)


def test_a_single_worker_on_a_server_is_resumed_exactly_too(postgresql: Storage, tmp_path: Path) -> None:
    whole = start(Storage.file(tmp_path / "whole.db"), 9, tmp_path, "whole")
    end(start(postgresql, 9, tmp_path, "killed", running="wait", dies_at=70))
    assert end(start(postgresql, 9, tmp_path, "killed", running="wait"), whole) == [0, 0]
    agreed(tmp_path, "killed", "whole")
    assert len(evaluated(tmp_path, "killed")) >= 9


def test_a_study_is_made_once_though_a_kill_left_its_table_without_the_index(tmp_path: Path) -> None:
    file, sampler = tmp_path / "study.db", optuna.samplers.RandomSampler()
    replace(Storage.file(file), study="other").open(TWO, sampler, {})
    with sqlite3.connect(file) as connection:
        connection.execute("DROP INDEX ix_studies_study_name")
    for _ in range(2):
        study_of(Storage.file(file))
    assert sorted(optuna.get_all_study_names(f"sqlite:///{file}")) == ["other", "search"]


def test_a_worker_that_was_taken_for_dead_goes_on_and_does_no_harm(storage: Storage) -> None:
    others, counts = list[pd.DataFrame](), list[int]()

    def suspended(vector: Vector) -> float:
        if not others:
            others.append(join(storage, 6, watched))
        return additive_loss(vector)

    def watched(vector: Vector) -> float:
        counts.append(len(running(storage)))
        return additive_loss(vector)

    result = join(replace(storage, heartbeat_s=1000), 6, suspended)
    pd.testing.assert_frame_equal(result, others[0])
    assert result["vector"].nunique() == 6
    assert counts[-1] == 1  # the trial of which the vector was taken over is set aside
    assert sorted(trial.state.name for trial in study_of(storage).trials) == ["COMPLETE"] * 6 + ["FAIL"]


def test_a_worker_killed_before_its_first_heartbeat_is_set_aside(tmp_path: Path) -> None:
    storage = Storage.file(tmp_path / "study.db", HEARTBEAT_S)
    study_of(storage).ask()
    assert join(storage, 4)["vector"].nunique() == 4
    assert not running(storage)


def test_of_two_workers_with_the_same_vector_the_later_gives_way(postgresql: Storage) -> None:
    study, seen = study_of(postgresql), list[Vector]()
    vector = (2,) * 8  # the second reference vector
    study.enqueue_trial({f"layer_{layer:02d}": groups for layer, groups in enumerate(vector)})
    earlier = study.ask()

    class Rival(optuna.samplers.RandomSampler):
        """Has the earlier worker write its vector at the moment at which the later one has proposed the same."""

        def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
            for name in study_of(postgresql).trials[0].system_attrs["fixed_params"]:
                earlier.suggest_categorical(name, (1, 2, 4))
            return super().infer_relative_search_space(study, trial)

    def loss(vector: Vector) -> float:
        seen.append(vector)
        return additive_loss(vector)

    search(problem(load_space("tiny")), loss, Rival, Budget(4), 0, postgresql, running="ignore")
    states = [(trial.state, tuple(trial.params.values()) == vector) for trial in study.trials[:2]]
    assert states == [(TrialState.FAIL, True)] * 2  # the earlier one too, for it never beats
    assert vector not in seen[:-1]
    assert len(seen) == 4


def test_workers_that_start_at_once_all_open_the_study(storage: Storage) -> None:
    barrier, opened = threading.Barrier(6), list[dict[str, Any]]()

    def begin() -> None:
        barrier.wait()
        study = storage.open(TWO, optuna.samplers.RandomSampler(), {"space": "tiny"})
        opened.append({"id": study._study_id, **study.user_attrs})

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [{"id": opened[0]["id"], "metadata": {"space": "tiny"}}] * 6


def test_a_search_begun_otherwise_is_not_joined(storage: Storage) -> None:
    ours, other = {"space": "tiny", "seed": "0"}, {"space": "tiny", "seed": "1"}
    storage.check(other)  # nothing has begun yet
    for _ in range(2):
        join(storage, 4, metadata=ours)
    storage.check({"seed": "0"})
    for differs in (partial(join, storage, 4, metadata=other), partial(storage.check, {"seed": "1"})):
        with pytest.raises(UserError, match=r"another seed \(0 there, 1 here\)"):
            differs()
    with pytest.raises(UserError, match="another seed"):
        join(storage, 4, metadata={"space": "tiny"})


def test_the_file_of_a_study_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "50%20? {a} #1" / "study.db"
    path.parent.mkdir()
    storage = Storage.file(path)
    study_of(storage)
    assert path.is_file()
    assert str(storage) == f"study {path}"


def test_a_locked_file_is_said_to_be_held_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.file(tmp_path / "study.db")
    study_of(storage)
    monkeypatch.setitem(storage_module._CONNECT, "sqlite", {"timeout": 0.05})
    monkeypatch.setattr(storage_module, "_LOCKED_S", 0.05)
    with sqlite3.connect(tmp_path / "study.db") as holder:
        holder.execute("BEGIN EXCLUSIVE")
        for use in (lambda: storage.check({}), lambda: study_of(storage)):
            sentence = r"is held by another process .*; end that one, and run again"
            with pytest.raises(UserError, match=sentence), storage.in_reach():
                use()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:secret@127.0.0.1:1/db", "cannot be read or written .* see that the server runs"),
        ("postgresql://127.0.0.1:1/db?user=me&password=secret", "cannot be read or written"),
        ("postgresql://me:secret@host:port/db", "give postgresql://USER@HOST/DATABASE"),
        ("postgresql://me:secret@in@127.0.0.1:1/db", "give postgresql://USER@HOST/DATABASE"),
        ("mysql://me:secret@127.0.0.1/db", "give postgresql://USER@HOST/DATABASE"),
        ("me:secret@127.0.0.1", "give postgresql://USER@HOST/DATABASE"),
    ],
)
def test_a_storage_that_cannot_be_had_is_one_sentence_without_the_password(url: str, says: str) -> None:
    storage = Storage(url)
    with pytest.raises(UserError, match=says) as caught:
        storage.check({})
    assert "\n" not in str(caught.value)
    assert "secret" not in f"{caught.value} {storage!r}"


def test_a_database_that_is_not_there_is_one_sentence_without_the_password(postgresql: Storage) -> None:
    url = sqlalchemy.make_url(postgresql.url).set(database="nowhere", password="secret")
    with pytest.raises(UserError, match='"nowhere" does not exist') as caught:
        Storage(url.render_as_string(hide_password=False)).check({})
    assert "secret" not in str(caught.value)


def test_a_sweep_gets_no_password_as_it_would_be_written_to_a_file(nas: Nas, tmp_path: Path) -> None:
    result = nas("search", "-m", "worker=0,1", "name=pool", "storage=postgresql://me:s3cret@host/studies")
    assert result.code == 1
    assert result.err.startswith("nas search: a sweep's command line is written to multirun.yaml")
    assert not list(tmp_path.rglob("*"))


def test_heartbeats_outlast_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, beats = Storage.file(tmp_path / "study.db", 0.01), list[int]()

    def beat(_: object, trial_id: int) -> None:
        beats.append(trial_id)
        raise StorageInternalError("the server is gone")

    monkeypatch.setattr(RDBStorage, "record_heartbeat", beat)

    def loss(vector: Vector) -> float:
        while len(beats) < 3:
            time.sleep(0.01)
        return additive_loss(vector)

    assert len(join(storage, 1, loss)) == 1


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=r"driver that is not installed .* pip install 'gqa-nas\[postgresql\]'"):
        Storage("postgresql://me:secret@host/db").check({})


PARENT = """
import sys, time
from nas.stages.workers import more_workers
for _ in range(2):
    with more_workers({work}, 2):
        print("begun", flush=True)
        sys.stdin.readline()
"""


def test_workers_of_this_machine_are_reported_when_killed_and_end_with_their_parent() -> None:
    code = PARENT.format(work="__import__('functools').partial(time.sleep, 600)")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    assert parent.stdout
    assert parent.stdin
    assert parent.stderr
    for last in (False, True):
        assert parent.stdout.readline() == "begun\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert children
        if not last:
            for child in children:
                child.kill()
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert parent.stderr.readline() == "worker 1 was killed (SIGKILL); the others did its share\n"
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]
