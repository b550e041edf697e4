"""Many workers on one study: one budget, no vector twice, and whatever is killed at whatever moment."""

import importlib.util
import itertools
import multiprocessing
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import psutil
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from nas.budget import Budget
from nas.errors import UserError
from nas.metrics import Metrics
from nas.search import Membership, Storage, search
from nas.search.claims import Claim, ClaimLostError, Claims
from nas.space import Vector, format_vector, load_space
from nas.stages.workers import more_workers
from tests.conftest import Nas
from tests.test_search import SAMPLERS, TWO, additive, problem

HEARTBEAT_S = 0.2  # a worker counts as gone after 1.2 s
PROCESSES = multiprocessing.get_context("forkserver")  # imports once, and forks a worker in milliseconds
PROCESSES.set_forkserver_preload([__name__])


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


@pytest.fixture
def postgresql(server: str) -> Storage:
    """A study in an empty PostgreSQL database."""
    engine = sqlalchemy.create_engine(f"postgresql+psycopg2{server.removeprefix('postgresql')}" % "postgres")
    name = f"test_{next(_COUNTER)}"
    while True:
        with suppress(sqlalchemy.exc.OperationalError):  # the server is starting
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
            break
        time.sleep(0.05)
    engine.dispose()
    return Storage(server % name)


_COUNTER = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A new study in either database."""
    if request.param == "sqlite":
        return Storage.file(tmp_path / "study.db")
    found: Storage = request.getfixturevalue("postgresql")
    return found


def work(
    storage: Storage, budget: int, membership: Membership, folder: Path, name: str, sampler: str, pause_s: float
) -> None:
    """Searches the tiny space; writes each evaluation into NAME.log and the result into NAME.csv."""

    def evaluate(vector: Vector) -> Metrics:
        time.sleep(pause_s)
        with (folder / f"{name}.log").open("a") as log:
            log.write(f"{format_vector(vector)}\n")
        return additive(vector)

    asked = problem(load_space("tiny"), evaluate)
    table = search(asked, SAMPLERS[sampler], Budget(budget, None), 0, storage, membership=membership)
    table.to_csv(folder / f"{name}.csv", index=False)


def start(
    storage: Storage,
    budget: int,
    folder: Path,
    name: str,
    sampler: str = "random",
    pause_s: float = 0.005,
    dead: str | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> ForkServerProcess:
    """Starts a worker in a process of its own; a busy machine can hold it up for longer than short heartbeats allow."""
    membership = Membership(name, dead, heartbeat_s)
    process = PROCESSES.Process(target=work, args=(storage, budget, membership, folder, name, sampler, pause_s))
    process.start()
    return process


def evaluated(folder: Path, name: str) -> list[str]:
    """What a worker evaluated so far."""
    log = folder / f"{name}.log"
    return log.read_text().splitlines() if log.exists() else []


def running(storage: Storage) -> list[FrozenTrial]:
    """The trials of a study that still run."""
    study = storage.open(TWO, optuna.samplers.RandomSampler())
    return study.get_trials(states=(TrialState.RUNNING,))


def test_four_workers_share_a_budget_and_agree_on_the_result(postgresql: Storage, tmp_path: Path) -> None:
    processes = [start(postgresql, 200, tmp_path, name, heartbeat_s=10.0) for name in "abcd"]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    results = {(tmp_path / f"{name}.csv").read_bytes() for name in "abcd"}
    assert len(results) == 1
    vectors = list(pd.read_csv(tmp_path / "a.csv")["vector"])
    assert len(vectors) == len(set(vectors)) == 200
    shares = [evaluated(tmp_path, name) for name in "abcd"]
    assert all(shares)
    assert sorted(itertools.chain(*shares)) == sorted(vectors)  # each by one worker, once


def test_the_others_finish_what_a_killed_worker_left(postgresql: Storage, tmp_path: Path) -> None:
    processes = [start(postgresql, 200, tmp_path, name) for name in "abcd"]
    while len(evaluated(tmp_path, "d")) < 10:
        time.sleep(0.01)
    processes[3].kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, -signal.SIGKILL]
    assert len({(tmp_path / f"{name}.csv").read_bytes() for name in "abc"}) == 1
    vectors = list(pd.read_csv(tmp_path / "a.csv")["vector"])
    assert len(vectors) == len(set(vectors)) == 200
    assert set(evaluated(tmp_path, "d")) <= set(vectors)
    assert not running(postgresql)


def test_two_workers_share_a_file_and_a_slow_one_is_not_taken_for_gone(tmp_path: Path) -> None:
    storage = Storage.file(tmp_path / "study.db")
    pauses = {"a": 5, "b": 0.005}  # the first is longer than six heartbeats
    processes = [start(storage, 40, tmp_path, name, pause_s=pauses[name], heartbeat_s=0.5) for name in pauses]
    for process in processes:
        process.join()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    vectors = list(pd.read_csv(tmp_path / "a.csv")["vector"])
    assert len(vectors) == len(set(vectors)) == 40
    assert sorted(evaluated(tmp_path, "a") + evaluated(tmp_path, "b")) == sorted(vectors)


def test_a_search_killed_twenty_times_equals_one_without_a_break(tmp_path: Path) -> None:
    whole = start(Storage.file(tmp_path / "whole.db"), 100, tmp_path, "whole", "front", pause_s=0)
    storage, moments, killed = Storage.file(tmp_path / "killed.db"), random.Random(0), 0
    for attempt in range(20):
        before = len(evaluated(tmp_path, "killed"))
        process = start(storage, 100, tmp_path, "killed", "front", pause_s=0.02, dead="")
        if attempt % 2:  # while it evaluates; else perhaps while it begins
            while process.is_alive() and len(evaluated(tmp_path, "killed")) <= before + attempt % 3:
                time.sleep(0.005)
        process.join(moments.uniform(0, 0.1 if attempt % 2 else 0.5))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 15
    assert 10 <= len(evaluated(tmp_path, "killed")) < 100
    last = start(storage, 100, tmp_path, "killed", "front", pause_s=0, dead="")
    last.join()
    whole.join()
    assert last.exitcode == whole.exitcode == 0
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(evaluated(tmp_path, "killed")) <= 100 + killed  # a kill costs one evaluation at most
    assert not running(storage)


def test_a_study_is_made_once_though_a_kill_left_its_table_without_the_index(tmp_path: Path) -> None:
    file, sampler = tmp_path / "study.db", optuna.samplers.RandomSampler()
    other = Storage.file(file, "other")
    other.open(TWO, sampler)
    with other.engine().begin() as connection:
        connection.execute(sqlalchemy.text("DROP INDEX ix_studies_study_name"))
    for _ in range(2):
        Storage.file(file).open(TWO, sampler)
    assert sorted(optuna.get_all_study_names(f"sqlite:///{file}")) == ["other", "search"]


def test_a_worker_that_was_taken_for_gone_goes_on_and_does_no_harm(storage: Storage) -> None:
    others, counts = list[pd.DataFrame](), list[int]()

    def join(name: str, heartbeat_s: float, evaluate: Callable[[Vector], Metrics]) -> pd.DataFrame:
        membership = Membership(name, None, heartbeat_s)
        asked = problem(load_space("tiny"), evaluate)
        return search(asked, SAMPLERS["random"], Budget(9, None), 0, storage, membership=membership)

    def suspended(vector: Vector) -> Metrics:
        if not others:
            others.append(join("other", HEARTBEAT_S, watched))
        return additive(vector)

    def watched(vector: Vector) -> Metrics:
        counts.append(len(running(storage)))
        return additive(vector)

    result = join("suspended", 1000, suspended)
    pd.testing.assert_frame_equal(result, others[0])
    assert result["vector"].nunique() == 9
    assert counts[-1] == 1  # the trial of which the vector was taken over is set aside
    trials = storage.open(TWO, optuna.samplers.RandomSampler()).trials
    assert sorted(trial.state.name for trial in trials) == ["COMPLETE"] * 9 + ["FAIL"]


def test_what_a_killed_worker_had_not_claimed_is_set_aside(storage: Storage) -> None:
    storage.open(TWO, optuna.samplers.RandomSampler()).ask()
    join = Membership("other", None, HEARTBEAT_S)
    search(problem(load_space("tiny")), SAMPLERS["random"], Budget(4, None), 0, storage, membership=join)
    assert not running(storage)


def worker(storage: Storage, name: str = "worker") -> Claims:
    """A worker's claims; it beats only when told to."""
    return Claims(storage, Membership(name, None, HEARTBEAT_S))


def in_threads(count: int, task: Callable[[int], None]) -> None:
    """Runs a task in threads that begin it at the same moment, and raises what one of them raises."""
    barrier, errors = threading.Barrier(count), list[Exception]()

    def run(index: int) -> None:
        barrier.wait()
        try:
            task(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_workers_that_start_at_once_all_open_the_study(storage: Storage) -> None:
    def begin(index: int) -> None:
        worker(storage, str(index)).agree({"space": "tiny"})
        assert storage.open(TWO, optuna.samplers.RandomSampler()).study_name == storage.study

    in_threads(6, begin)
    assert len(optuna.get_all_study_names(storage.engine().url.render_as_string(hide_password=False))) == 1


def test_no_slot_and_no_vector_is_held_twice(storage: Storage) -> None:
    held: list[tuple[int, Vector]] = []

    def claim_all(index: int) -> None:
        own, wishes = worker(storage, str(index)), random.Random(index)
        while claim := own.take(30):
            while not own.assign(claim, vector := (wishes.randrange(6), wishes.randrange(6))):
                pass
            held.append((claim.slot, vector))

    in_threads(4, claim_all)
    slots, vectors = zip(*held, strict=True)
    assert sorted(slots) == list(range(30))
    assert len(set(vectors)) == 30
    assert worker(storage).vectors() == set(vectors)


def test_a_claim_is_taken_over_only_from_a_silent_worker(storage: Storage) -> None:
    silent, live, other = worker(storage, "silent"), worker(storage, "live"), worker(storage, "other")
    left, kept = silent.take(9), live.take(9)
    assert left
    assert kept
    silent.assign(left, (1, 2))
    assert other.adopt() is None
    assert other.under_way() == (2, 0)
    time.sleep(7 * HEARTBEAT_S)
    live.beat()
    assert other.under_way() == (1, 1)
    assert other.adopt() == Claim(left.slot, (1, 2))
    assert other.adopt() is None
    for change in (lambda: silent.assign(left, (2, 1)), lambda: silent.finish(left)):
        with pytest.raises(ClaimLostError):
            change()
    other.finish(Claim(left.slot, (1, 2)))
    live.assign(kept, (4, 4))
    live.finish(kept)
    assert other.done() == {left.slot: (1, 2), kept.slot: (4, 4)}
    assert other.under_way() == (0, 0)


def test_of_many_that_see_a_worker_gone_one_takes_over(storage: Storage) -> None:
    gone = worker(storage, "machine-1")
    claims = [gone.take(5) for _ in range(5)]
    worker(storage).release("machine-1/")
    adopted: list[Claim] = []

    def adopt(index: int) -> None:
        own = worker(storage, str(index))
        while claim := own.adopt():
            adopted.append(claim)

    in_threads(4, adopt)
    assert sorted(claim.slot for claim in adopted) == [claim.slot for claim in claims if claim]


def test_a_search_begun_otherwise_is_not_joined(storage: Storage) -> None:
    def join(**facts: str) -> None:
        search(problem(load_space("tiny")), SAMPLERS["random"], Budget(4, None), 0, storage, facts=facts)

    join(space="tiny", seed="0")
    join(space="tiny", seed="0")
    with pytest.raises(UserError, match=r"another seed \(0 there, 1 here\)"):
        join(space="tiny", seed="1")
    with pytest.raises(UserError, match="another seed"):
        join(space="tiny")


def test_the_file_of_a_study_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "50%20? {a} #1" / "study.db"
    path.parent.mkdir()
    storage = Storage.file(path)
    search(problem(load_space("tiny")), SAMPLERS["random"], Budget(4, None), 0, storage)
    assert path.is_file()
    assert str(storage) == f"study {path}"


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
        search(problem(load_space("tiny")), SAMPLERS["random"], Budget(4, None), 0, storage)
    assert "\n" not in str(caught.value)
    assert "secret" not in f"{caught.value} {storage!r}"


def test_a_database_that_is_not_there_is_one_sentence_without_the_password(postgresql: Storage) -> None:
    url = sqlalchemy.make_url(postgresql.url).set(database="nowhere", password="secret")
    storage = Storage(url.render_as_string(hide_password=False))
    with pytest.raises(UserError, match='"nowhere" does not exist') as caught:
        search(problem(load_space("tiny")), SAMPLERS["random"], Budget(4, None), 0, storage)
    assert "secret" not in str(caught.value)


def test_a_sweep_gets_no_password_as_it_would_be_written_to_a_file(nas: Nas, tmp_path: Path) -> None:
    result = nas("search", "-m", "worker=0,1", "name=pool", "storage=postgresql://me:s3cret@host/studies")
    assert result.code == 1
    assert result.err.startswith("nas search: a sweep's command line is written to multirun.yaml")
    assert not list(tmp_path.rglob("*"))


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=r"driver that is not installed .* pip install 'gqa-nas\[postgresql\]'"):
        Storage("postgresql://me:secret@host/db").engine()


def test_lost_trials_are_named(tmp_path: Path) -> None:
    storage = Storage.file(tmp_path / "study.db")
    search(problem(load_space("tiny")), SAMPLERS["random"], Budget(5, None), 0, storage)
    lost = Claims(storage, Membership("other"))
    claim = lost.take(6)
    assert claim
    assert lost.assign(claim, (4, 2, 1, 1, 1, 1, 1, 1))
    lost.finish(claim)
    with pytest.raises(UserError, match=r"has lost the trials of 4-2-1-1-1-1-1-1; restore it, or give another name="):
        search(problem(load_space("tiny")), SAMPLERS["random"], Budget(6, None), 0, storage)


def wait_for_ever() -> None:
    """A worker that never ends."""
    time.sleep(600)


def test_a_worker_of_this_machine_that_is_killed_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    others = multiprocessing.active_children()
    with more_workers(wait_for_ever, 3):
        ours = [process for process in multiprocessing.active_children() if process not in others]
        first, second = sorted(ours, key=lambda process: process.pid or 0)
        first.kill()
    assert not first.is_alive()
    assert not second.is_alive()
    assert "worker 1 was killed (SIGKILL); the others did its share" in capfd.readouterr().err


def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "import time; from nas.stages.workers import more_workers; from tests.test_workers import wait_for_ever\n"
        "with more_workers(wait_for_ever, 2): print('begun', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    assert parent.stdout.readline() == "begun\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]
