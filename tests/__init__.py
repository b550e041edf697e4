"""Tests end processes, not machines: their studies need not reach the disk, only the other processes."""

import sqlite3
from contextlib import suppress

import sqlalchemy


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def _do_not_wait_for_the_disk(connection: object, _: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        with suppress(sqlite3.Error):  # no database, or a locked one: that is for the test to find
            connection.execute("PRAGMA synchronous=OFF")
