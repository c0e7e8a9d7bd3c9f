"""A journal's SQLite file: who may open it, its schema, and what is written in one transaction.

WAL mode with ``synchronous=NORMAL``: a commit is a write to the page cache without a wait for the disk. It survives the
end of this process, however it ends; a machine that loses power may lose the last commits, never a part of one.
Knows nothing of threads and asyncio; use it in one thread at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

_log = logging.getLogger(__name__)
_APPLICATION_ID = 0x53684A6C  # "ShJl": this file is a journal of ours
_SCHEMA_VERSION = 1
_SCHEMA = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE model (identity TEXT NOT NULL);
    CREATE TABLE requests (
        request_key INTEGER PRIMARY KEY,
        request_id TEXT NOT NULL UNIQUE,
        entry BLOB NOT NULL,  -- without its tokens while it is in flight
        queue_s REAL,
        time_to_first_token_s REAL,
        expires_s REAL  -- seconds since 1970; NULL: in flight
    );
    CREATE INDEX requests_by_expiry ON requests (expires_s) WHERE expires_s IS NOT NULL;
    CREATE TABLE tokens (
        request_key INTEGER NOT NULL,
        position INTEGER NOT NULL,  -- of the first one
        tokens BLOB NOT NULL,
        PRIMARY KEY (request_key, position)
    ) WITHOUT ROWID;
    PRAGMA application_id = {_APPLICATION_ID};
    PRAGMA user_version = {_SCHEMA_VERSION};
    COMMIT;
"""
_LOCK_TIMEOUT_S = 1.0  # a driver that was killed holds nothing; one that stops may take a moment
_MAX_WAL_BYTES = 64 << 20


class JournalError(Exception):
    """The journal cannot be used; the message is one line that names the setting."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"driver.journal: {path}: {reason}")


class Opened(NamedTuple):
    """A request was accepted. It takes the place of a retained one with its id."""

    request_key: int
    request_id: str
    entry: bytes


class Started(NamedTuple):
    """A request has its first token; durations from its acceptance."""

    request_key: int
    queue_s: float
    time_to_first_token_s: float


class Appended(NamedTuple):
    """Tokens of one request that came together."""

    request_key: int
    position: int  # of the first one
    tokens: bytes


class Closed(NamedTuple):
    """A request ended: retained with all of its tokens, or (None) forgotten."""

    request_key: int
    entry: bytes | None
    expires_s: float = 0.0  # seconds since 1970


class Forgotten(NamedTuple):
    """A retained request that nobody will ask for."""

    request_id: str


class Identified(NamedTuple):
    """The requests in flight go on with another model."""

    model: str


Change: TypeAlias = Opened | Started | Appended | Closed | Forgotten | Identified


class LiveRow(NamedTuple):
    """A request in flight, as it was written."""

    request_key: int
    entry: bytes
    queue_s: float | None
    time_to_first_token_s: float | None
    tokens: list[bytes]  # in order


class JournalFile:
    """Holds the file, and every other driver off it, until ``close`` or the end of this process.

    ``model`` identifies what is served: requests in flight for another one cannot go on, and are forgotten.
    Raises JournalError.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it holds what clients wrote
        except OSError as error:
            raise JournalError(path, f"cannot be opened for writing ({error.strerror})") from None
        self._connection = sqlite3.connect(path, _LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            self._open(model)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.Error):
                raise JournalError(path, _explain(error)) from None
            raise

    def live_rows(self) -> Iterator[LiveRow]:
        """Requests in flight, oldest first."""
        columns = "request_key, entry, queue_s, time_to_first_token_s"
        rows = self._connection.execute(f"SELECT {columns} FROM requests WHERE expires_s IS NULL ORDER BY request_key")
        for key, entry, queue_s, time_to_first_token_s in rows.fetchall():
            query = "SELECT tokens FROM tokens WHERE request_key = ? ORDER BY position"
            tokens = [data for (data,) in self._connection.execute(query, (key,))]
            yield LiveRow(key, entry, queue_s, time_to_first_token_s, tokens)

    def last_key(self) -> int:
        """The largest request_key in use."""
        (key,) = self._connection.execute("SELECT coalesce(max(request_key), 0) FROM requests").fetchone()
        return int(key)

    def find_ended(self, request_id: str) -> bytes | None:
        """The entry of a retained request."""
        query = "SELECT entry FROM requests WHERE request_id = ? AND expires_s > ?"
        row = self._connection.execute(query, (request_id, time.time())).fetchone()
        return None if row is None else bytes(row[0])

    def write(self, changes: Iterable[Change]) -> None:
        """All of them or none. Raises sqlite3.Error."""
        with self._transaction():
            for kind, group in itertools.groupby(changes, type):
                if kind is Appended:  # nearly all there is
                    self._connection.executemany("INSERT INTO tokens VALUES (?, ?, ?)", group)
                else:
                    for change in group:
                        self._apply(change)
            self._delete_expired()

    def close(self) -> None:
        self._connection.close()

    def _open(self, model: str) -> None:
        # Before the first access: the lock is then kept from one transaction to the next, and no memory is shared.
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        is_new = self._check_schema()  # nothing is written to a file of others
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(f"PRAGMA journal_size_limit = {_MAX_WAL_BYTES}")
        if is_new:
            self._connection.executescript(_SCHEMA)
        with self._transaction():
            before = [identity for (identity,) in self._connection.execute("SELECT identity FROM model")]
            if before != [model]:
                self._forget_live(before, model)
                self._apply(Identified(model))
            self._delete_expired()

    def _forget_live(self, models: list[str], model: str) -> None:
        self._connection.execute("DELETE FROM tokens")
        num_lost = self._connection.execute("DELETE FROM requests WHERE expires_s IS NULL").rowcount
        if num_lost:
            _log.warning(
                "driver.journal: %s: %d requests in flight are forgotten: they began with %s, and %s is served",
                self.path, num_lost, ", ".join(models), model,
            )  # fmt: skip

    def _check_schema(self) -> bool:
        """Whether the file is new. Raises JournalError if it is not a journal of this version."""
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (num_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if num_tables == 0 and application_id == 0:
            return True
        if application_id != _APPLICATION_ID:
            raise JournalError(self.path, "is the database of another program; give another path")
        if version != _SCHEMA_VERSION:
            reason = f"was written by another version (schema {version}, this one has {_SCHEMA_VERSION})"
            raise JournalError(self.path, f"{reason}; let that version drain, or move the file away")
        return False

    def _apply(self, change: Change) -> None:
        execute = self._connection.execute
        match change:
            case Opened():
                execute("INSERT OR REPLACE INTO requests (request_key, request_id, entry) VALUES (?, ?, ?)", change)
            case Started(key, queue_s, first_s):
                query = "UPDATE requests SET queue_s = ?, time_to_first_token_s = ? WHERE request_key = ?"
                execute(query, (queue_s, first_s, key))
            case Closed(key, entry, expires_s):
                execute("DELETE FROM tokens WHERE request_key = ?", (key,))
                if entry is None:
                    execute("DELETE FROM requests WHERE request_key = ?", (key,))
                else:
                    query = "UPDATE requests SET entry = ?, expires_s = ? WHERE request_key = ?"
                    execute(query, (entry, expires_s, key))
            case Forgotten():
                execute("DELETE FROM requests WHERE request_id = ? AND expires_s IS NOT NULL", change)
            case Identified():
                execute("DELETE FROM model")
                execute("INSERT INTO model VALUES (?)", change)

    def _delete_expired(self) -> None:
        self._connection.execute("DELETE FROM requests WHERE expires_s <= ?", (time.time(),))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # some errors have rolled it back already
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _explain(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorcode", None):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "another driver uses it; give each driver its own"
        case sqlite3.SQLITE_NOTADB:
            return "is not a SQLite database; give another path or move the file away"
        case sqlite3.SQLITE_READONLY:
            return f"cannot be written ({error}); its folder must be writable too"
    return f"{error}; move the file away to start with an empty journal"
