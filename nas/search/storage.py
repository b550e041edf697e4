"""Where a study lives: a SQLite file in the run directory, or a PostgreSQL database that many machines share.

Everything that a database can refuse becomes one sentence here, and no sentence shows a password.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel  # has no public name
from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from nas.errors import UserError, causes
from nas.files import without_passwords
from nas.search.pareto import Objectives

Result = TypeVar("Result")

_LOCK_TIMEOUT_S = 60  # SQLite: how long to wait while another process writes
_CONNECT_TIMEOUT_S = 10
_OPTIONS = {"sqlite": {"timeout": _LOCK_TIMEOUT_S}, "postgresql": {"connect_timeout": _CONNECT_TIMEOUT_S}}
_DRIVERS = {"postgresql": "postgresql+psycopg2"}  # SQLAlchemy's own choice depends on its version
_ATTEMPTS = 20


@dataclass(frozen=True)
class Storage:
    """A study's database and its name there.

    Attributes:
        url: ``sqlite:///FILE`` or ``postgresql://USER@HOST/DATABASE``.
        study: Name of the study.
    """

    url: str = field(repr=False)  # may hold a password
    study: str = "search"

    @staticmethod
    def file(path: Path, study: str = "search") -> "Storage":
        """A SQLite file."""
        return Storage(URL.create("sqlite", database=str(path)).render_as_string(), study)

    def __str__(self) -> str:
        if self.url.startswith("sqlite:"):
            return f"study {make_url(self.url).database}"
        return f"study {self.study} in {without_passwords(self.url)}"

    def engine(self) -> Engine:
        """A connection pool.

        Raises:
            UserError: The URL is none, or names a database or driver that is not there.
        """
        url = self._parsed()
        try:
            return sqlalchemy.create_engine(url, **self._options(url))
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise UserError(
                f"storage {without_passwords(self.url)} needs a driver that is not installed ({error}); "
                "pip install 'gqa-nas[postgresql]'"
            ) from None

    def open(self, objectives: Objectives, sampler: BaseSampler) -> optuna.Study:
        """The study, made if it is not there yet."""
        url = self._parsed()

        def create() -> optuna.Study:
            storage = RDBStorage(url.render_as_string(hide_password=False), self._options(url))
            for table in BaseModel.metadata.sorted_tables:  # a kill can leave a table without the index that follows,
                for index in table.indexes:  # and then every start would make one more study of the name
                    index.create(storage.engine, checkfirst=True)
            return optuna.create_study(
                storage=storage,
                study_name=self.study,
                directions=objectives.directions,
                sampler=sampler,
                load_if_exists=True,
            )

        study = unless_raced(create)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(objectives.names))  # what optuna-dashboard shows
        return study

    @contextmanager
    def in_reach(self) -> Iterator[None]:
        """Turns what goes wrong between us and the database into one sentence.

        Raises:
            UserError: It cannot be reached, read or written.
        """
        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as error:
            cause = without_passwords(str(error.__cause__ or error).splitlines()[0])
            fix = "free disk space or restore it" if self.url.startswith("sqlite:") else "see that the server runs"
            raise UserError(f"{self} cannot be read or written ({cause}); {fix}, and run again") from None

    def _parsed(self) -> URL:
        url = None
        with suppress(ArgumentError, ValueError):  # ValueError: a port that is no number
            url = make_url(self.url)
        known = url is not None and url.database and url.drivername in ("sqlite", *_DRIVERS, *_DRIVERS.values())
        if url is None or not known or "@" in (url.host or ""):  # an @ of the password
            raise UserError(  # does not repeat what it was given: who knows where in it the password is
                "storage is not the URL of a PostgreSQL database; give postgresql://USER@HOST/DATABASE, a password's "
                "@ : / as %40 %3A %2F, or leave it out for a file in the run directory"
            )
        return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))

    @staticmethod
    def _options(url: URL) -> dict[str, object]:
        """Arguments of the engine. A connection that broke while a vector was evaluated is made anew."""
        return {"connect_args": _OPTIONS[url.get_backend_name()], "pool_pre_ping": True}


def unless_raced(make: Callable[[], Result]) -> Result:
    """Makes tables or a study that another worker may be making at the same moment; whoever is second finds them."""
    for attempt in range(_ATTEMPTS):
        try:
            return make()
        except Exception as error:
            messages = [str(cause).lower() for cause in causes(error)]
            raced = any("already exists" in message or "duplicate" in message for message in messages)
            if attempt + 1 == _ATTEMPTS or not (raced or isinstance(error, IntegrityError)):
                raise
            time.sleep(0.02 * (attempt + 1))
    raise AssertionError("unreachable")
