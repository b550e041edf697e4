"""Where a study lives: a SQLite file in the run directory, or a PostgreSQL database that many machines share.

Everything that a database can refuse becomes one sentence here, and no sentence shows a password.
"""

import itertools
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel  # has no public name
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from nas.errors import UserError, without_passwords
from nas.search.pareto import Objectives

_BEATS_OF_GRACE = 6  # so many heartbeats may fail to arrive before a worker counts as dead
_LOCKED_S = 10.0  # that a SQLite file may be locked when a study is opened
_POSTGRESQL = "postgresql+psycopg2"  # SQLAlchemy's own choice of a driver depends on its version
_ATTEMPTS = 20
_METADATA = "metadata"  # the study's user attribute that all workers must have in common


class _QuickFile(sqlite3.Connection):
    """A SQLite file whose commits do not wait for the disk: a trial takes one for each layer and each metric.

    What a process has committed outlives it. If the machine crashes, the file may be damaged; removed, the search finds
    again what it held, for losses are remembered elsewhere.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.execute("PRAGMA synchronous=OFF")


_CONNECT: dict[str, dict[str, Any]] = {  # seconds; SQLite's: for a lock
    "sqlite": {"timeout": 60, "factory": _QuickFile},
    "postgresql": {"connect_timeout": 10},
}


class _PatientStorage(RDBStorage):
    """Goes on to beat after an outage; the worker itself meets what does not pass."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError):
            super().record_heartbeat(trial_id)


@dataclass(frozen=True)
class Storage:
    """A study's database and its name there."""

    url: str = field(repr=False)  # sqlite:///FILE or postgresql://USER@HOST/DATABASE; may hold a password
    study: str = "search"
    heartbeat_s: float = 10.0  # between two signs of life of a worker

    @staticmethod
    def file(path: Path, heartbeat_s: float = 10.0) -> "Storage":
        """A SQLite file."""
        return Storage(URL.create("sqlite", database=str(path)).render_as_string(), heartbeat_s=heartbeat_s)

    @property
    def _is_file(self) -> bool:
        return self.url.startswith("sqlite:")

    def __str__(self) -> str:
        if self._is_file:
            return f"study {make_url(self.url).database}"
        return f"study {self.study} in {without_passwords(self.url)}"

    def open(self, objectives: Objectives, sampler: BaseSampler, metadata: Mapping[str, str]) -> optuna.Study:
        """The study, made if it is not there yet; refused if it was begun with other metadata."""
        if self._is_file:
            with closing(sqlite3.connect(str(make_url(self.url).database), timeout=_LOCKED_S)) as probe:
                probe.execute("BEGIN EXCLUSIVE")  # who holds it longer is no worker, and Optuna would wait for minutes
        study = optuna.create_study(
            storage=self._connect(),
            study_name=self.study,
            directions=["maximize" if up else "minimize" for up in objectives.maximise],
            sampler=sampler,
            load_if_exists=True,
        )
        study.set_metric_names(list(objectives.names))  # what optuna-dashboard shows
        if _METADATA not in study.user_attrs:
            study.set_user_attr(_METADATA, dict(metadata))
        theirs = study.user_attrs[_METADATA]  # perhaps of another worker that began at this moment
        self._compare(theirs, {**dict.fromkeys(theirs), **metadata})
        return study

    def check(self, metadata: Mapping[str, str]) -> None:
        """Refuses a study that was begun with other metadata, and a storage that cannot be reached."""
        with self.in_reach():
            storage = self._connect()
            begun = {study.study_name: study.user_attrs for study in storage.get_all_studies()}
            storage.engine.dispose()
        self._compare(begun.get(self.study, {}).get(_METADATA, metadata), metadata)

    def _compare(self, theirs: Mapping[str, str], ours: Mapping[str, str | None]) -> None:
        for key, value in ours.items():
            if theirs.get(key) != value:
                fix = "repeat its command to join it, or give another name="
                raise UserError(f"{self} was begun with another {key} ({theirs.get(key)} there, {value} here); {fix}")

    @contextmanager
    def in_reach(self) -> Iterator[None]:
        """Turns what goes wrong between us and the database into one sentence, and Optuna's remarks into none."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats, names of metrics
                warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # outside Study.optimize
                yield
        except (StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
            cause = without_passwords(str(error.__cause__ or error).splitlines()[0])
            if "is locked" in cause:
                raise UserError(f"{self} is held by another process ({cause}); end that one, and run again") from None
            fix = "free disk space, restore it, or remove it" if self._is_file else "see that the server runs"
            raise UserError(f"{self} cannot be read or written ({cause}); {fix}, and run again") from None

    def _connect(self, attempt: int = 1) -> _PatientStorage:
        """Optuna's storage with its tables, which another worker may be making at the same moment."""
        url = self._parsed()
        try:
            storage = _PatientStorage(
                url.render_as_string(hide_password=False),
                {"connect_args": _CONNECT[url.get_backend_name()], "pool_pre_ping": True},  # reconnects after a break
                heartbeat_interval=self.heartbeat_s,  # type: ignore[arg-type]  # fractions work too
                grace_period=_BEATS_OF_GRACE * self.heartbeat_s,  # type: ignore[arg-type]
            )
            # A kill can leave a table without its index, and then every start would make one more study.
            for index in itertools.chain(*(table.indexes for table in BaseModel.metadata.sorted_tables)):
                index.create(storage.engine, checkfirst=True)
            return storage
        except ImportError as error:
            raise UserError(
                f"storage {without_passwords(self.url)} needs a driver that is not installed "
                f"({error.__cause__ or error}); pip install 'gqa-nas[postgresql]'"
            ) from None
        except (SQLAlchemyError, StorageInternalError) as error:
            raced = re.search("already exists|duplicate|unique", str(error.__cause__ or error), re.IGNORECASE)
            if not raced or attempt == _ATTEMPTS:
                raise
        time.sleep(0.02 * attempt)
        return self._connect(attempt + 1)

    def _parsed(self) -> URL:
        with suppress(ArgumentError, ValueError):  # ValueError: a port that is no number
            url = make_url(self.url)
            driver = _POSTGRESQL if url.drivername == "postgresql" else url.drivername
            if url.database and driver in ("sqlite", _POSTGRESQL) and "@" not in (url.host or ""):  # of the password
                return url.set(drivername=driver)
        raise UserError(  # does not repeat what it was given: who knows where in it the password is
            "storage is not the URL of a PostgreSQL database; give postgresql://USER@HOST/DATABASE, a password's "
            "@ : / as %40 %3A %2F, or leave it out for a file in the run directory"
        )
