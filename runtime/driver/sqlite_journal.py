"""The journal on disk: accepted requests outlive the driver.

Changes are collected during one callback of the event loop and handed as a whole to a thread, which commits them, and
whatever else has come by then, in one transaction. The loop never waits for the disk.

What this promises: once ``sync`` has returned, what was opened before is on disk. Tokens follow a moment later, and
nobody waits for them: a token that a client saw and that was lost with the process is generated again, and is the same
one, because noise is a function of (seed, position) alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shardray.runtime.config import Config
from shardray.runtime.driver.ends import RequestEnd
from shardray.runtime.driver.errors import SuspendedError
from shardray.runtime.driver.journal import DEFAULT_RETAIN_S, Journal, MemoryJournal, is_retained
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.journal_file import (
    Appended,
    Change,
    Closed,
    Forgotten,
    Identified,
    JournalError,
    JournalFile,
    LiveRow,
    Opened,
    Started,
)
from shardray.runtime.engine.request import TokenOutput

_log = logging.getLogger(__name__)
_EXPIRY_INTERVAL_S = 60.0  # how often requests past their time are looked for while nothing is written
_Tokens = tuple[list[int], list[bytes]]  # ids, and log-probabilities where the entry keeps them
_encoder = msgspec.msgpack.Encoder()
_tokens_decoder = msgspec.msgpack.Decoder(_Tokens)
T = TypeVar("T")


class SqliteJournal:
    """A Journal in one file; ``model`` identifies what is served, since nothing else can go on with its requests.

    Requests that are not resumable are kept in memory only: nobody could ask for them after a restart. Raises
    JournalError. If the disk fails later, the log tells so once, and requests go on without outliving the driver.
    """

    outlives_driver = True

    def __init__(self, path: Path, model: str = "", retain_s: float = DEFAULT_RETAIN_S) -> None:
        self.retain_s = retain_s
        self._file = JournalFile(path, model)
        self._last_key = self._file.last_key()
        self._entries: dict[str, JournalEntry] = {}
        self._keys: dict[str, int] = {}  # of those that are on disk
        self._grown: dict[str, int] = {}  # entries with new tokens, and how many tokens they had before
        self._changes: list[Change] = []
        self._is_flush_due = False
        self._is_stopped = False
        try:
            self._load()
        except msgspec.DecodeError as error:
            self._file.close()
            raise JournalError(path, f"holds a request that cannot be read ({error}); move the file away") from None
        self._inbox: queue.SimpleQueue[list[Change] | Callable[[], Any] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_until_stopped, name="journal", daemon=True)
        self._writer.start()

    def open(self, entry: JournalEntry) -> None:
        if entry.request_id in self._entries:
            raise KeyError(entry.request_id)
        self._entries[entry.request_id] = entry
        if entry.resumable_s > 0:
            self._last_key += 1
            self._keys[entry.request_id] = self._last_key
            self._change(Opened(self._last_key, entry.request_id, entry.to_bytes()))
        else:
            self._change(Forgotten(entry.request_id))

    def append(self, request_id: str, token: TokenOutput) -> None:
        entry = self._entries[request_id]
        if request_id in self._keys:
            self._grown.setdefault(request_id, len(entry.sent_ids))
            self._schedule_flush()
        entry.append(token)

    def close(self, request_id: str, end: RequestEnd | None = None) -> None:
        entry = self._entries.pop(request_id, None)
        key = self._keys.pop(request_id, None)
        self._grown.pop(request_id, None)
        if entry is None:
            self._change(Forgotten(request_id))
        elif key is not None and is_retained(entry, end):
            entry.end = end
            self._change(Closed(key, entry.to_bytes(), time.time() + self.retain_s))
        elif key is not None:
            self._change(Closed(key, None))

    def entries(self) -> list[JournalEntry]:
        return list(self._entries.values())

    def set_model(self, identity: str) -> None:
        self._change(Identified(identity))

    async def find_ended(self, request_id: str) -> JournalEntry | None:
        if self._is_stopped:
            raise SuspendedError("the server is shutting down; ask again when it is started again")
        data = await self._in_writer(lambda: self._file.find_ended(request_id))
        return None if data is None else JournalEntry.from_bytes(data)

    async def sync(self) -> None:
        if not self._is_stopped:
            await self._in_writer(lambda: None)

    async def stop(self) -> None:
        if not self._is_stopped:
            self._flush()
            self._is_stopped = True
            self._inbox.put(None)
            await asyncio.to_thread(self._writer.join)

    def _change(self, change: Change) -> None:
        self._changes.append(change)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Hand over what one callback of the loop has changed."""
        self._is_flush_due = False
        for request_id, position in self._grown.items():
            entry, key = self._entries[request_id], self._keys[request_id]
            if position == 0 and entry.first_token_s is not None and entry.dispatched_s is not None:
                first_s = entry.first_token_s - entry.accepted_s
                self._changes.append(Started(key, entry.dispatched_s - entry.accepted_s, first_s))
            tokens = (entry.sent_ids[position:], entry.sent_logprobs[position:])
            self._changes.append(Appended(key, position, _encoder.encode(tokens)))
        self._grown.clear()
        changes, self._changes = self._changes, []
        if changes and not self._is_stopped:
            self._inbox.put(changes)

    async def _in_writer(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the writer's thread, after everything that was changed before."""
        self._flush()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._inbox.put(lambda: _resolve(done, function))
        return await asyncio.wrap_future(done)

    def _load(self) -> None:
        for row in self._file.live_rows():
            entry = _restore(row)
            self._entries[entry.request_id] = entry
            self._keys[entry.request_id] = row.request_key

    def _write_until_stopped(self) -> None:
        write: Callable[[list[Change]], None] = self._file.write
        item: list[Change] | Callable[[], Any] | None = []
        while item is not None:
            changes: list[Change] = []
            try:
                item = self._inbox.get(timeout=_EXPIRY_INTERVAL_S)
                while isinstance(item, list):
                    changes += item
                    item = self._inbox.get_nowait()
            except queue.Empty:
                item = []
            try:
                write(changes)
            except sqlite3.Error as error:
                # For good: a request whose tokens have a gap could not go on from them.
                write = _discard
                _log.error("driver.journal: %s: %s; requests no longer outlive the driver", self._file.path, error)
            if callable(item):
                item()
        self._file.close()


def open_journal(config: Config) -> Journal:
    """The journal that the settings ask for. Raises JournalError."""
    settings = config.driver
    if settings.journal is None:
        return MemoryJournal(settings.retain_s)
    return SqliteJournal(Path(settings.journal), config.model.identity, settings.retain_s)


def _discard(changes: list[Change]) -> None:
    """Instead of a disk that has failed."""


def _restore(row: LiveRow) -> JournalEntry:
    entry = JournalEntry.from_bytes(row.entry)
    if row.queue_s is not None and row.time_to_first_token_s is not None:
        entry.dispatched_s = entry.accepted_s + row.queue_s
        entry.first_token_s = entry.accepted_s + row.time_to_first_token_s
    for data in row.tokens:
        token_ids, logprobs = _tokens_decoder.decode(data)
        entry.sent_ids += token_ids
        entry.sent_logprobs += logprobs
    return entry


def _resolve(done: concurrent.futures.Future[T], function: Callable[[], T]) -> None:
    if done.set_running_or_notify_cancel():
        try:
            done.set_result(function())
        except Exception as error:
            done.set_exception(error)
