"""The journal on disk gives back what was written to it, and refuses files that it must not touch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import resource
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardray.runtime.driver.ends import RequestEnd
from shardray.runtime.driver.errors import DeadlineExceededError
from shardray.runtime.driver.journal import Journal, MemoryJournal
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.journal_file import JournalError
from shardray.runtime.driver.sqlite_journal import SqliteJournal
from shardray.runtime.engine.request import FieldError, FinishReason, SamplingParams, TokenOutput
from tests.journal_load import entry_of, token_at

pytestmark = pytest.mark.asyncio
PARAMS = SamplingParams(
    temperature=0.7,
    top_k=5,
    logit_bias={3: 1.5, 70_000: -100.0},
    seed=2**64 - 1,
    max_tokens=50,
    stop_token_ids=(4, 5),
    stop=("é", "END"),
    logprobs=2,
)
LENGTH = RequestEnd(FinishReason.LENGTH, with_token=True)


def make_entry(request_id: str = "a", resumable_s: float = 30.0) -> JournalEntry:
    return JournalEntry(request_id, (1, 2, 70_000), PARAMS, priority=-3, timeout_s=90.0, resumable_s=resumable_s)


def make_token(token_id: int) -> TokenOutput:
    return TokenOutput("a", token_id, -0.1 * token_id, ((token_id, -0.5), (9, -1 / 3)))


async def reopen(journal: SqliteJournal, path: Path, model: str = "") -> SqliteJournal:
    await journal.stop()
    return SqliteJournal(path, model)


async def test_another_driver_finds_requests_in_flight_with_all_that_it_needs_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    entry = make_entry()
    journal.open(entry)
    for token_id in (10, 11, 12):
        entry.dispatched_s = entry.first_token_s = entry.accepted_s + 0.25
        journal.append("a", make_token(token_id))
        await asyncio.sleep(0)
    journal.open(make_entry("b"))
    journal = await reopen(journal, path)
    [restored, other] = journal.entries()
    assert other.request_id == "b"
    assert restored.outputs() == [make_token(token_id) for token_id in (10, 11, 12)]
    assert (restored.prompt_ids, restored.params, restored.priority) == (entry.prompt_ids, PARAMS, -3)
    assert (restored.timeout_s, restored.resumable_s) == (90.0, 30.0)
    assert restored.deadline_s == pytest.approx(entry.deadline_s, abs=0.05)
    assert restored.first_token_s == pytest.approx(restored.accepted_s + 0.25)
    journal.append("a", make_token(13))
    journal = await reopen(journal, path)
    assert [entry.sent_ids for entry in journal.entries()] == [[10, 11, 12, 13], []]
    await journal.stop()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(st.integers(0, 200_000), min_size=1, max_size=4), max_size=8))
async def test_tokens_come_back_in_order_however_they_were_batched(batches: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / f"{time.monotonic_ns()}.db"
    journal = SqliteJournal(path)
    journal.open(make_entry())
    for batch in batches:
        for token_id in batch:
            journal.append("a", make_token(token_id))
        await asyncio.sleep(0)
    journal = await reopen(journal, path)
    [restored] = journal.entries()
    assert restored.outputs() == [make_token(token_id) for token_id in itertools.chain(*batches)]
    await journal.stop()


async def test_requests_that_nobody_can_resume_are_not_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    journal.open(make_entry(resumable_s=0.0))
    journal.append("a", make_token(1))
    assert [entry.sent_ids for entry in journal.entries()] == [[1]]
    journal.close("a", LENGTH)
    assert await journal.find_ended("a") is None
    journal.open(make_entry("b", resumable_s=0.0))
    journal = await reopen(journal, path)
    assert journal.entries() == []
    await journal.stop()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_an_end_is_retained_for_its_time_unless_nobody_wants_it(tmp_path: Path, kind: str) -> None:
    retain_s = 1.5
    journal: Journal = (
        MemoryJournal(retain_s) if kind == "memory" else SqliteJournal(tmp_path / "journal.db", retain_s=retain_s)
    )
    ends = {
        "length": LENGTH,
        "stop string": RequestEnd(),
        "deadline": RequestEnd.from_error(DeadlineExceededError("too late")),
        "aborted": RequestEnd(FinishReason.ABORTED),
        "gone": None,
    }
    for request_id, end in ends.items():
        journal.open(make_entry(request_id))
        journal.append(request_id, make_token(7))
        journal.close(request_id, end)
    found = {request_id: await journal.find_ended(request_id) for request_id in ends}
    assert {request_id for request_id, entry in found.items() if entry} == {"length", "stop string", "deadline"}
    assert found["length"] is not None
    assert [(output.token_id, output.finish_reason) for output in found["length"].outputs()] == [
        (7, FinishReason.LENGTH)
    ]
    journal.close("length")
    assert await journal.find_ended("length") is None
    journal.open(make_entry("stop string"))
    assert await journal.find_ended("stop string") is None
    await asyncio.sleep(retain_s)
    assert await journal.find_ended("deadline") is None
    await journal.stop()


async def test_expired_ends_leave_the_file_and_retained_ones_outlive_the_driver(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for request_id, retain_s in (("kept", 60.0), ("expired", 0.01)):
        journal = SqliteJournal(path, retain_s=retain_s)
        journal.open(make_entry(request_id))
        journal.append(request_id, make_token(1))
        journal.close(request_id, LENGTH)
        await journal.stop()
    await asyncio.sleep(0.02)
    journal = SqliteJournal(path)
    assert await journal.find_ended("kept") is not None
    await journal.stop()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT request_id FROM requests").fetchall() == [("kept",)]
        assert connection.execute("SELECT count(*) FROM tokens").fetchone() == (0,)


async def test_a_memory_journal_holds_no_more_than_its_bound() -> None:
    journal = MemoryJournal()
    params = SamplingParams(max_tokens=100_000, seed=1)
    for number in range(20):
        journal.open(JournalEntry(str(number), tuple(range(200_000, 400_000)), params, resumable_s=30.0))
        journal.close(str(number), LENGTH)
    kept = [number for number in range(20) if await journal.find_ended(str(number)) is not None]
    assert kept == list(range(12, 20))  # 1 MB each


@pytest.mark.parametrize(
    "error", [DeadlineExceededError("too late"), FieldError("top_k", "is odd")], ids=lambda error: type(error).__name__
)
async def test_an_error_comes_back_as_it_was(error: Exception) -> None:
    restored = RequestEnd.from_error(error).as_error()
    assert (type(restored), str(restored)) == (type(error), str(error))


async def test_requests_for_another_model_are_forgotten_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path, "small")
    journal.open(make_entry())
    journal = await reopen(journal, path, "small")
    assert len(journal.entries()) == 1
    assert not caplog.records
    journal = await reopen(journal, path, "large")
    assert journal.entries() == []
    assert "1 requests in flight are forgotten: they began with small, and large is served" in caplog.text
    await journal.stop()


async def test_requests_that_went_on_with_another_model_are_kept_for_that_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path, "small")
    journal.open(make_entry())
    journal.set_model("large")
    journal = await reopen(journal, path, "large")
    assert len(journal.entries()) == 1
    journal = await reopen(journal, path, "small")
    assert journal.entries() == []
    await journal.stop()


async def test_two_drivers_cannot_have_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    opener = "import sys; from pathlib import Path; from shardray.runtime.driver.sqlite_journal import SqliteJournal"
    command = [sys.executable, "-c", f"{opener}; SqliteJournal(Path(sys.argv[1]))", str(path)]
    other = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"driver.journal: {path}: another driver uses it" in other.stderr
    journal.open(make_entry())
    await journal.sync()
    journal = await reopen(journal, path)
    assert len(journal.entries()) == 1
    await journal.stop()


async def test_files_that_are_no_journal_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database " * 100)
    other = tmp_path / "other.db"
    newer = tmp_path / "newer.db"
    await SqliteJournal(newer).stop()
    for path, statement in ((other, "CREATE TABLE songs (name TEXT)"), (newer, "PRAGMA user_version = 99")):
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()
    reasons = {
        text: "is not a SQLite database",
        other: "is the database of another program",
        newer: r"was written by another version \(schema 99, this one has 1\)",
        tmp_path: "Is a directory",
        tmp_path / "missing" / "journal.db": "No such file or directory",
    }
    for path, reason in reasons.items():
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(JournalError, match=rf"^driver\.journal: .*{path.name}: .*{reason}.*$"):
            SqliteJournal(path)
        assert (path.read_bytes() if path.is_file() else b"") == before


async def test_a_disk_that_fails_is_logged_once_and_requests_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    journal.open(make_entry())
    journal.append("a", make_token(1))
    await journal.sync()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with caplog.at_level(logging.ERROR):
            for _ in range(500):
                journal.append("a", make_token(2))
                await journal.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1
    assert "requests no longer outlive the driver" in caplog.text
    assert len(journal.entries()[0].sent_ids) == 501
    journal = await reopen(journal, path)
    [restored] = journal.entries()
    assert restored.sent_ids == [1] + [2] * (len(restored.sent_ids) - 1)  # what there is has no gap
    await journal.stop()


async def test_a_journal_that_is_killed_under_load_is_whole_every_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    chance = random.Random(1)
    for round_number in range(20):
        first = round_number * 1_000_000
        command = [sys.executable, "-m", "tests.journal_load", str(path), str(first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        promised = [int(process.stdout.readline())]
        await asyncio.sleep(chance.uniform(0, 0.15))
        process.kill()
        promised += [int(line) for line in process.stdout.read().splitlines() if line]
        process.wait()
        process.stdout.close()
        journal = SqliteJournal(path, "model")
        live = {entry.request_id: entry for entry in journal.entries()}
        for number in range(first, max(promised) + 1):
            entry = live.get(f"r{number}") or await journal.find_ended(f"r{number}")
            assert entry is not None
            tokens = [token_at(number, position) for position in range(len(entry.sent_ids))]
            assert [output.token_id for output in entry.outputs()] == [token.token_id for token in tokens]
            assert entry.params == entry_of(number).params
            if number % 2:
                assert [output.logprob for output in entry.outputs()] == [token.logprob for token in tokens]
        await journal.stop()
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
