"""Writes a journal as fast as it can until it is killed. Prints the id of each request once it must be on disk."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from shardray.runtime.driver.ends import RequestEnd
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.sqlite_journal import SqliteJournal
from shardray.runtime.engine.request import FinishReason, SamplingParams, TokenOutput

NUM_LIVE = 32
MAX_TOKENS = 200


def token_at(number: int, position: int) -> TokenOutput:
    token_id = (number * 7919 + position) % 50_000
    return TokenOutput(f"r{number}", token_id, -position / 8, ((token_id, -0.25),))


def entry_of(number: int) -> JournalEntry:
    params = SamplingParams(max_tokens=MAX_TOKENS, seed=number, logprobs=1 if number % 2 else None)
    return JournalEntry(f"r{number}", (number, 1, 2), params, resumable_s=60)


async def write_forever(path: Path, first: int) -> None:
    journal = SqliteJournal(path, "model")
    for entry in journal.entries():
        journal.close(entry.request_id)
    numbers = list(range(first, first + NUM_LIVE))
    for number in numbers:
        journal.open(entry_of(number))
    while True:
        for index, number in enumerate(numbers):
            entry = entry_of(number)
            position = len(live.sent_ids) if (live := _find(journal, entry.request_id)) else 0
            journal.append(entry.request_id, token_at(number, position))
            if position + 1 >= 20 + number % (MAX_TOKENS - 20):
                journal.close(entry.request_id, RequestEnd(FinishReason.LENGTH, with_token=True))
                numbers[index] = max(numbers) + 1
                journal.open(entry_of(numbers[index]))
                await journal.sync()
                print(numbers[index], flush=True)
        await asyncio.sleep(0)


def _find(journal: SqliteJournal, request_id: str) -> JournalEntry | None:
    return next((entry for entry in journal.entries() if entry.request_id == request_id), None)


if __name__ == "__main__":
    asyncio.run(write_forever(Path(sys.argv[1]), int(sys.argv[2])))
