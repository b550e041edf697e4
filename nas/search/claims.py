"""Who evaluates what: the claims of the workers on one study, in the study's own database.

A search has so many *slots*, one an evaluation. A worker claims a slot, has the sampler propose a vector for it, writes
the vector into its claim, evaluates it, tells the study, and marks the claim done. The database, not this code, sees to
it that no slot and no vector is taken twice: UNIQUE (study, slot) and UNIQUE (study, vector).

A worker beats: while it lives, a thread raises the counter in its unfinished claims. A claim whose counter has stood
still for the grace period, by the observer's own clock, is taken over, slot and vector: one UPDATE that names the old
owner and the old count, so that of many only one succeeds. No two machines' clocks are ever compared.

    nas_claims     study, slot, vector (NULL until proposed), owner, beat, done
    nas_searches   study, facts: what the workers must have in common
"""

import json
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from nas.errors import UserError
from nas.search.storage import Storage, unless_raced
from nas.space import Vector, format_vector, parse_vector

_BEATS_OF_GRACE = 6  # so many may fail to arrive before a worker counts as gone
_NOBODY = ""

_TABLES = MetaData()
_CLAIMS = Table(
    "nas_claims",
    _TABLES,
    Column("study", String(512), primary_key=True),
    Column("slot", Integer, primary_key=True, autoincrement=False),
    Column("vector", String(2048)),
    Column("owner", String(512), nullable=False),
    Column("beat", Integer, nullable=False),
    Column("done", Boolean, nullable=False),
    UniqueConstraint("study", "vector"),
)
_SEARCHES = Table("nas_searches", _TABLES, Column("study", String(512), primary_key=True), Column("facts", Text))


@dataclass(frozen=True)
class Membership:
    """A worker's standing among the workers of a study.

    Attributes:
        home: What the names of this worker, and of the others that die with it, begin with.
        dead: The workers whose names begin so are known to be gone, and what they left is taken over at once; ``""``
            is all of them, None none.
        heartbeat_s: Seconds between two beats; six of them are the grace period.
    """

    home: str = ""
    dead: str | None = ""
    heartbeat_s: float = 10.0


@dataclass(frozen=True)
class Claim:
    """An evaluation that a worker has taken on: its place, and the vector once one was proposed."""

    slot: int
    vector: Vector | None = None


class ClaimLostError(Exception):
    """Another worker took this one for gone and took its claim over."""


class Claims:
    """One worker's view of the claims.

    Args:
        storage: Where the study lives.
        membership: The worker's standing.
    """

    def __init__(self, storage: Storage, membership: Membership) -> None:
        self._storage, self._engine, self._membership = storage, storage.engine(), membership
        self.owner = f"{membership.home}/{uuid.uuid4().hex}"
        self._seen: dict[int, tuple[str, int, float]] = {}  # by slot: owner, beat, and since when so
        unless_raced(lambda: _TABLES.create_all(self._engine))

    def agree(self, facts: Mapping[str, str]) -> None:
        """Settles what the search is: the first worker's facts, which every other's must equal.

        Raises:
            UserError: They do not.
        """
        with suppress(IntegrityError), self._engine.begin() as connection:
            connection.execute(insert(_SEARCHES).values(study=self._storage.study, facts=json.dumps(dict(facts))))
        theirs = _facts(self._engine, self._storage.study)
        _compare(self._storage, theirs, {**dict.fromkeys(theirs), **facts})

    def take(self, slots: int) -> Claim | None:
        """Claims the lowest of ``slots`` slots that is free, or returns None."""
        while True:
            with self._engine.connect() as connection:
                highest = connection.scalar(select(func.max(_CLAIMS.c.slot)).where(self._of_study()))
            slot = 0 if highest is None else highest + 1  # a slot once taken stays taken
            if slot >= slots:
                return None
            row = {"study": self._storage.study, "slot": slot, "owner": self.owner, "beat": 0, "done": False}
            with suppress(IntegrityError), self._engine.begin() as connection:  # another worker was faster
                connection.execute(insert(_CLAIMS).values(**row))
                return Claim(slot)

    def assign(self, claim: Claim, vector: Vector) -> bool:
        """Writes the proposed vector into an own claim; False if another claim has that vector.

        Raises:
            ClaimLostError: The claim is no longer this worker's.
        """
        try:
            self._change(self._own(claim), vector=format_vector(vector))
        except IntegrityError:
            return False
        return True

    def finish(self, claim: Claim) -> None:
        """Marks an own claim as done.

        Raises:
            ClaimLostError: It is no longer this worker's.
        """
        self._change(self._own(claim), done=True)

    def adopt(self, vectors: Collection[Vector] | None = None) -> Claim | None:
        """Takes over the lowest unfinished claim of a worker that is gone, or returns None.

        Args:
            vectors: Only a claim of one of these counts; None: any.
        """
        for row in self._others()[1]:
            if vectors is not None and row.claim.vector not in vectors:
                continue
            with suppress(ClaimLostError):
                same = and_(_CLAIMS.c.slot == row.slot, _CLAIMS.c.owner == row.owner, _CLAIMS.c.beat == row.beat)
                self._change(same, owner=self.owner, beat=0)
                return row.claim
        return None

    def release(self, dead: str) -> None:
        """Gives up the unfinished claims of all workers whose names begin with ``dead``."""
        theirs = _CLAIMS.c.owner.startswith(dead, autoescape=True)
        with self._engine.begin() as connection:
            unfinished = and_(self._of_study(), ~_CLAIMS.c.done, theirs)
            connection.execute(update(_CLAIMS).where(unfinished).values(owner=_NOBODY, beat=0))

    def under_way(self) -> tuple[int, int]:
        """How many unfinished claims others have: of workers that live, and of workers that are gone."""
        live, gone = self._others()
        return len(live), len(gone)

    def done(self) -> dict[int, Vector]:
        """The vectors of the finished claims by slot, in the order of the slots."""
        columns = select(_CLAIMS.c.slot, _CLAIMS.c.vector).where(self._of_study(), _CLAIMS.c.done)
        with self._engine.connect() as connection:
            return {slot: parse_vector(vector) for slot, vector in connection.execute(columns.order_by(_CLAIMS.c.slot))}

    def count_done(self) -> int:
        """How many claims are finished."""
        with self._engine.connect() as connection:
            count = select(func.count()).select_from(_CLAIMS).where(self._of_study(), _CLAIMS.c.done)
            return connection.scalar(count) or 0

    def vectors(self) -> set[Vector]:
        """All vectors that are claimed, finished or not."""
        with self._engine.connect() as connection:
            claimed = select(_CLAIMS.c.vector).where(self._of_study(), _CLAIMS.c.vector.is_not(None))
            return set(map(parse_vector, connection.scalars(claimed)))

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beats for as long as the block runs."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self._membership.heartbeat_s):
                with suppress(SQLAlchemyError):  # the worker itself meets what does not pass
                    self.beat()

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    def beat(self) -> None:
        """Shows the others that this worker lives."""
        with self._engine.begin() as connection:
            own = and_(self._of_study(), _CLAIMS.c.owner == self.owner, ~_CLAIMS.c.done)
            connection.execute(update(_CLAIMS).where(own).values(beat=_CLAIMS.c.beat + 1))

    def _of_study(self) -> ColumnElement[bool]:
        return _CLAIMS.c.study == self._storage.study

    def _own(self, claim: Claim) -> ColumnElement[bool]:
        return and_(_CLAIMS.c.slot == claim.slot, _CLAIMS.c.owner == self.owner)

    def _change(self, which: ColumnElement[bool], **values: object) -> None:
        """Changes the one unfinished claim that fits; the database does both in one step."""
        with self._engine.begin() as connection:
            fits = and_(self._of_study(), ~_CLAIMS.c.done, which)
            if connection.execute(update(_CLAIMS).where(fits).values(**values)).rowcount == 0:
                raise ClaimLostError

    def _others(self) -> tuple[list["_Row"], list["_Row"]]:
        """Unfinished claims of others by slot: those whose owner beats, and those whose owner is gone."""
        columns = (_CLAIMS.c.slot, _CLAIMS.c.owner, _CLAIMS.c.beat, _CLAIMS.c.vector)
        unfinished = select(*columns).where(self._of_study(), ~_CLAIMS.c.done, _CLAIMS.c.owner != self.owner)
        with self._engine.connect() as connection:
            rows = [_Row(*row) for row in connection.execute(unfinished.order_by(_CLAIMS.c.slot))]
        now, before = time.monotonic(), self._seen
        self._seen = {row.slot: (row.owner, row.beat, now) for row in rows}
        self._seen |= {slot: seen for slot, seen in before.items() if self._seen.get(slot, ())[:2] == seen[:2]}
        grace_s = _BEATS_OF_GRACE * self._membership.heartbeat_s
        gone = [row for row in rows if row.owner == _NOBODY or now - self._seen[row.slot][2] > grace_s]
        return [row for row in rows if row not in gone], gone


@dataclass(frozen=True)
class _Row:
    """An unfinished claim as it stands in the database."""

    slot: int
    owner: str
    beat: int
    vector: str | None

    @property
    def claim(self) -> Claim:
        return Claim(self.slot, parse_vector(self.vector) if self.vector else None)


def check_facts(storage: Storage, facts: Mapping[str, str]) -> None:
    """Connects, and compares what is known of a search so far with what it was begun with, if it was.

    Raises:
        UserError: The storage is out of reach, or the search was begun otherwise.
    """
    with storage.in_reach():
        engine = storage.engine()
        try:
            begun = inspect(engine).has_table(_SEARCHES.name) and _facts(engine, storage.study)
        finally:
            engine.dispose()
    if begun:
        _compare(storage, begun, facts)


def _compare(storage: Storage, theirs: Mapping[str, str], ours: Mapping[str, str | None]) -> None:
    for key, fact in ours.items():
        if theirs.get(key) != fact:
            raise UserError(
                f"{storage} was begun with another {key} ({theirs.get(key)} there, {fact} here); repeat its command to "
                "join it, or give another name="
            )


def _facts(engine: Engine, study: str) -> dict[str, str]:
    with engine.connect() as connection:
        text = connection.scalar(select(_SEARCHES.c.facts).where(_SEARCHES.c.study == study))
    return dict(json.loads(text)) if text else {}
