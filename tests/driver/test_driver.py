"""Requests through a driver and real leader processes: each ends exactly once, and frees what it held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.deltas import Delta
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    QueueFullError,
    UnavailableError,
)
from shardray.runtime.driver.journal import MemoryJournal
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.stream import RequestStream
from shardray.runtime.engine.request import FinishReason, SamplingParams
from shardray.runtime.model.tokenizer import Tokenizer
from tests.serving import SHARD, Serving, eventually, serving
from tests.stub_replica import SECRET

pytestmark = pytest.mark.asyncio
PROMPT = (10, 11, 12)
LONG = SamplingParams(max_tokens=400)


async def read_all(stream: RequestStream) -> list[Delta]:
    return [delta async for delta in stream]


async def read_ids(stream: RequestStream) -> list[int]:
    return [token_id for delta in await read_all(stream) for token_id in delta.token_ids]


async def engine_is_idle(up: Serving) -> None:
    """The engine has worked and reports that no request is left, long before the request's own end."""

    def idle() -> bool:
        [stats] = [replica.stats for replica in up.driver.fleet.ready_replicas()]
        return 0 < stats.num_output_tokens < 100 and stats.num_running == stats.num_waiting == 0

    await eventually(idle)


@pytest_asyncio.fixture
async def slow(tokenizer: Tokenizer) -> AsyncIterator[Serving]:
    async with serving(tokenizer, step_time_s=0.02, max_num_seqs=2) as up:
        yield up


async def test_many_streams_at_once_each_get_all_of_their_own_tokens(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=2) as up:
        prompts = [(number, number + 1, number + 2) for number in range(60)]
        params = SamplingParams(max_tokens=50)
        streams = [up.driver.submit(str(number), prompt, params) for number, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*(read_ids(stream) for stream in streams))
        assert answers == [[prompt[i % 3] for i in range(50)] for prompt in prompts]
        status = up.driver.fleet.snapshot()
        assert status.num_live_requests == status.num_queued_requests == 0
        assert [replica.num_live_requests for replica in status.replicas] == [0, 0]


async def test_requests_are_spread_over_the_replicas(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=2, step_time_s=0.02) as up:
        streams = [up.driver.submit(str(number), PROMPT, LONG) for number in range(6)]
        assert [replica.num_live_requests for replica in up.driver.fleet.ready_replicas()] == [3, 3]
        for stream in streams:
            up.driver.release(stream)


async def test_a_driver_without_replicas_is_unavailable_and_says_why(tokenizer: Tokenizer) -> None:
    driver = Driver("m", tokenizer, LimitsSettings(), 8)
    driver.fleet.set_loading(0, "loading weights", 0.4)
    with pytest.raises(UnavailableError, match="loading: replica 0: loading weights"):
        driver.submit("a", PROMPT, LONG)


async def test_a_request_id_can_be_used_again_once_its_request_has_ended(slow: Serving) -> None:
    driver = slow.driver
    stream = driver.submit("a", PROMPT, LONG)
    with pytest.raises(DuplicateRequestError):
        driver.submit("a", PROMPT, LONG)
    driver.release(stream)
    assert await read_ids(driver.submit("a", PROMPT, SamplingParams(max_tokens=3))) == [10, 11, 12]


async def test_a_full_queue_refuses_the_next_request_and_goes_on_later(tokenizer: Tokenizer) -> None:
    limits = LimitsSettings(max_queued_requests=2)
    async with serving(tokenizer, limits=limits, step_time_s=0.01, max_num_seqs=2) as up:
        # Two run, one more is at the replica to take their place, two wait.
        streams = [up.driver.submit(str(number), PROMPT, SamplingParams(max_tokens=5)) for number in range(5)]
        assert up.driver.fleet.snapshot().num_queued_requests == 2
        with pytest.raises(QueueFullError, match="max_queued_requests"):
            up.driver.submit("late", PROMPT, LONG)
        answers = await asyncio.gather(*(read_ids(stream) for stream in streams))
        assert all(len(answer) == 5 for answer in answers)
        assert len(await read_ids(up.driver.submit("late", PROMPT, SamplingParams(max_tokens=5)))) == 5


async def test_a_replica_is_sent_as_many_searches_as_their_beams_have_places(tokenizer: Tokenizer) -> None:
    search = SamplingParams(num_beams=4, max_tokens=20)
    async with serving(tokenizer, step_time_s=0.01, max_num_seqs=8) as up:
        # Two run, one more is at the replica to take their place, one waits.
        streams = [up.driver.submit(str(number), PROMPT, search) for number in range(4)]
        assert up.driver.fleet.snapshot().num_queued_requests == 1
        await asyncio.gather(*(read_ids(stream) for stream in streams))
        assert up.driver.fleet.snapshot().replicas[0].num_live_sequences == 0


async def test_time_in_the_queue_is_reported(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02, max_num_seqs=1) as up:
        params = SamplingParams(max_tokens=10)
        streams = [up.driver.submit(str(number), PROMPT, params) for number in range(3)]
        last = (await asyncio.gather(*(read_all(stream) for stream in streams)))[-1][-1]
        assert last.timing is not None
        assert last.timing.time_to_first_token_s is not None
        assert 0.15 < last.timing.queue_s < last.timing.time_to_first_token_s < last.timing.total_s


async def test_a_released_request_frees_its_place_in_the_engine(slow: Serving) -> None:
    stream = slow.driver.submit("a", PROMPT, LONG)
    await anext(aiter(stream))
    slow.driver.release(stream)
    slow.driver.release(stream)
    await engine_is_idle(slow)
    assert slow.driver.fleet.snapshot().num_live_requests == 0


async def test_a_stop_string_frees_the_place_in_the_engine_too(slow: Serving, tokenizer: Tokenizer) -> None:
    prompt = tuple(tokenizer.encode("abcd"))
    stream = slow.driver.submit("a", prompt, SamplingParams(max_tokens=400, stop=("da",)))
    deltas = await read_all(stream)
    assert "".join(delta.text for delta in deltas) == "abc"
    assert deltas[-1].finish_reason is FinishReason.STOP
    await engine_is_idle(slow)


async def test_an_aborted_request_ends_with_that_reason_and_a_second_abort_does_nothing(slow: Serving) -> None:
    stream = slow.driver.submit("a", PROMPT, LONG)
    await anext(aiter(stream))
    assert slow.driver.abort("a") is True
    assert slow.driver.abort("a") is False
    assert (await read_all(stream))[-1].finish_reason is FinishReason.ABORTED
    await engine_is_idle(slow)


async def test_a_waiting_request_can_be_aborted(slow: Serving) -> None:
    streams = [slow.driver.submit(str(number), PROMPT, LONG) for number in range(5)]
    assert slow.driver.abort("4") is True
    [delta] = await read_all(streams[4])
    assert delta.finish_reason is FinishReason.ABORTED
    assert slow.driver.fleet.snapshot().num_queued_requests == 1


async def test_a_request_past_its_deadline_fails_and_frees_its_place(slow: Serving) -> None:
    stream = slow.driver.submit("a", PROMPT, LONG, timeout_s=0.1)
    with pytest.raises(DeadlineExceededError, match=r"0\.1 s"):
        await read_all(stream)
    await engine_is_idle(slow)


async def test_deadlines_are_bounded_by_the_limits(tokenizer: Tokenizer) -> None:
    limits = LimitsSettings(default_deadline_s=0.1, max_deadline_s=0.2)
    async with serving(tokenizer, limits=limits, step_time_s=0.02) as up:
        for timeout_s, expected in ((None, "0.1 s"), (60.0, "0.2 s")):
            with pytest.raises(DeadlineExceededError, match=expected):
                await read_all(up.driver.submit("a", PROMPT, LONG, timeout_s))


async def test_lower_priority_values_are_served_first(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.01, max_num_seqs=1) as up:
        order: list[str] = []

        async def run(request_id: str, priority: int) -> None:
            stream = up.driver.submit(request_id, PROMPT, SamplingParams(max_tokens=3), priority=priority)
            await read_all(stream)
            order.append(request_id)

        names = {"first": 0, "second": 0, "low": 5, "normal": 0, "high": -5}
        await asyncio.gather(*(run(name, priority) for name, priority in names.items()))
        assert order == ["first", "second", "high", "normal", "low"]


async def test_a_shutdown_lets_streams_end_within_the_grace(slow: Serving) -> None:
    stream = slow.driver.submit("a", PROMPT, SamplingParams(max_tokens=10))
    stopping = asyncio.create_task(slow.driver.shutdown(grace_s=10))
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="shutting down"):
        slow.driver.submit("b", PROMPT, LONG)
    assert len(await read_ids(stream)) == 10
    await asyncio.wait_for(stopping, 5)


async def test_a_shutdown_fails_what_does_not_end_within_the_grace(slow: Serving) -> None:
    streams = [slow.driver.submit(str(number), PROMPT, LONG) for number in range(5)]
    await asyncio.wait_for(slow.driver.shutdown(grace_s=0.1), 5)
    for stream in streams:
        with pytest.raises(UnavailableError, match="shutting down"):
            await read_all(stream)


async def test_the_journal_holds_all_that_a_replay_needs_while_a_request_lives(slow: Serving) -> None:
    journal = MemoryJournal()
    driver = Driver("m", None, LimitsSettings(), 2, journal)
    await driver.attach(0, slow.replicas[0].address, SECRET, [SHARD])
    stream = driver.submit("a", PROMPT, LONG, priority=2)
    sent: list[int] = []
    async for delta in stream:
        sent += delta.token_ids
        if len(sent) >= 4:
            break
    [entry] = journal.entries()
    assert isinstance(entry, JournalEntry)
    replay = entry.as_engine_request("a#2")
    assert replay.generated_ids[: len(sent)] == tuple(sent)
    assert (replay.prompt_ids, replay.params, replay.priority) == (PROMPT, LONG, 2)
    driver.release(stream)
    assert journal.entries() == []
    await driver.shutdown(0)
