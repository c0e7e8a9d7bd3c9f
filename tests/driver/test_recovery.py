"""Replicas are killed, replaced, retired and poisoned under a driver; the streams go on with the same tokens."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.errors import BrokenRequestError, QueueFullError, UnavailableError
from shardray.runtime.driver.fleet import FleetState
from shardray.runtime.driver.link import LinkError
from shardray.runtime.driver.stream import RequestStream
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.model.tokenizer import Tokenizer
from tests.serving import SHARD, Serving, eventually, serving
from tests.stub_replica import SECRET, StubReplica

pytestmark = pytest.mark.asyncio
PROMPT = (10, 11, 12)
PARAMS = SamplingParams(max_tokens=60)
EXPECTED = [PROMPT[i % 3] for i in range(60)]
POISON_ID = 7


async def read_ids(stream: RequestStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


def start(up: Serving, num_requests: int) -> list[asyncio.Task[list[int]]]:
    streams = [up.driver.submit(str(number), PROMPT, PARAMS) for number in range(num_requests)]
    return [asyncio.create_task(read_ids(stream)) for stream in streams]


async def some_tokens_came(up: Serving, replica_id: int = 0) -> None:
    await eventually(lambda: up.driver.fleet.snapshot().replicas[replica_id].stats.num_output_tokens > 0)


async def replace(up: Serving, replica_id: int = 0, **options: float) -> None:
    """A new replica under the same id."""
    up.replicas.append(StubReplica(step_time_s=0.02, **options))
    await up.driver.attach(replica_id, up.replicas[-1].address, SECRET, [SHARD])


@dataclasses.dataclass
class Healing:
    """Replaces the only replica whenever it is lost, as the layer below does."""

    up: Serving
    options: dict[str, float]
    num_losses: int = 0

    def on_link_lost(self, replica_id: int) -> None:
        self.num_losses += 1
        self._task = asyncio.create_task(replace(self.up, replica_id, **self.options))


@pytest_asyncio.fixture
async def slow(tokenizer: Tokenizer) -> AsyncIterator[Serving]:
    async with serving(tokenizer, step_time_s=0.02, max_num_seqs=4) as up:
        yield up


async def test_streams_of_a_killed_replica_wait_and_go_on_with_the_same_tokens(slow: Serving) -> None:
    answers = start(slow, 7)
    await some_tokens_came(slow)
    slow.replicas[0].kill()
    await eventually(lambda: slow.driver.fleet.snapshot().state is FleetState.RECOVERING)
    late = asyncio.create_task(read_ids(slow.driver.submit("late", PROMPT, PARAMS)))
    await asyncio.sleep(0.1)
    assert not any(answer.done() for answer in [*answers, late])
    await replace(slow)
    assert await asyncio.gather(*answers, late) == [EXPECTED] * 8
    assert slow.driver.fleet.snapshot().num_live_requests == 0


async def test_another_replica_takes_the_streams_over_at_once(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=2, step_time_s=0.02) as up:
        answers = start(up, 6)
        await some_tokens_came(up)
        up.replicas[0].kill()
        assert await asyncio.gather(*answers) == [EXPECTED] * 6
        states = [replica.state for replica in up.driver.fleet.snapshot().replicas]
        assert states == [FleetState.RECOVERING, FleetState.READY]


async def test_the_queue_keeps_its_bound_and_its_order_while_a_replica_recovers(tokenizer: Tokenizer) -> None:
    limits = LimitsSettings(max_queued_requests=3)
    async with serving(tokenizer, limits=limits, step_time_s=0.02, max_num_seqs=1) as up:
        answers = start(up, 3)
        await some_tokens_came(up)
        up.replicas[0].kill()
        await eventually(lambda: up.driver.fleet.snapshot().state is FleetState.RECOVERING)
        with pytest.raises(QueueFullError):
            up.driver.submit("one too many", PROMPT, PARAMS)
        await replace(up, max_num_seqs=1)
        done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        assert done == {answers[0]}, "the one that had begun goes first"
        assert await asyncio.gather(*answers) == [EXPECTED] * 3


async def test_a_replica_gives_way_to_its_successor_without_a_pause_in_service(slow: Serving) -> None:
    answers = start(slow, 4)
    await some_tokens_came(slow)
    await replace(slow)
    assert slow.driver.fleet.snapshot().state is FleetState.READY
    assert await asyncio.gather(*answers) == [EXPECTED] * 4
    assert slow.replicas[0].process.poll() is None, "the old one was left in peace"


async def test_a_retired_replica_hands_its_streams_to_the_others(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=2, step_time_s=0.02) as up:
        answers = start(up, 6)
        await some_tokens_came(up, 1)
        await up.driver.retire(1)
        assert [replica.replica_id for replica in up.driver.fleet.snapshot().replicas] == [0]
        assert await asyncio.gather(*answers) == [EXPECTED] * 6


async def test_giving_up_the_last_replica_fails_every_request_with_the_reason(slow: Serving) -> None:
    streams = [slow.driver.submit(str(number), PROMPT, PARAMS) for number in range(6)]
    slow.driver.give_up(0, "its weights are gone")
    for stream in streams:
        with pytest.raises(UnavailableError, match="its weights are gone"):
            await read_ids(stream)
    with pytest.raises(UnavailableError, match="its weights are gone"):
        slow.driver.submit("late", PROMPT, PARAMS)
    assert slow.driver.fleet.snapshot().state is FleetState.FAILED


async def test_a_replica_that_cannot_be_reached_changes_nothing(slow: Serving) -> None:
    answers = start(slow, 2)
    with pytest.raises(LinkError):
        await slow.driver.attach(0, "127.0.0.1:1", SECRET, [SHARD])
    assert await asyncio.gather(*answers) == [EXPECTED] * 2


async def test_a_shutdown_while_nothing_runs_fails_what_waits(slow: Serving) -> None:
    stream = slow.driver.submit("a", PROMPT, PARAMS)
    slow.replicas[0].kill()
    await eventually(lambda: slow.driver.fleet.snapshot().state is FleetState.RECOVERING)
    await slow.driver.shutdown(0.05)
    with pytest.raises(UnavailableError, match="shutting down"):
        await read_ids(stream)


@pytest.mark.parametrize("position", [0, pytest.param(2, marks=pytest.mark.slow), 9])
async def test_a_request_that_breaks_every_step_fails_alone(tokenizer: Tokenizer, position: int) -> None:
    poison = {"poison_id": POISON_ID, "poison_position": position}
    async with serving(tokenizer, step_time_s=0.02, **poison) as up:
        healing = Healing(up, poison)
        up.driver.on_link_lost = healing.on_link_lost
        answers = start(up, 5)
        broken = up.driver.submit("broken", (POISON_ID, 1), PARAMS)
        with pytest.raises(BrokenRequestError, match="a step was poisoned"):
            await asyncio.wait_for(read_ids(broken), 60)
        assert await asyncio.gather(*answers) == [EXPECTED] * 5
        assert healing.num_losses <= 5


async def test_two_that_break_steps_are_both_found(tokenizer: Tokenizer) -> None:
    poison = {"poison_id": POISON_ID, "poison_position": 1}
    async with serving(tokenizer, step_time_s=0.02, **poison) as up:
        up.driver.on_link_lost = Healing(up, poison).on_link_lost
        first = up.driver.submit("first", (POISON_ID, 1), PARAMS)
        answers = start(up, 4)
        second = up.driver.submit("second", (POISON_ID, 2), PARAMS)
        results = await asyncio.gather(read_ids(first), read_ids(second), *answers, return_exceptions=True)
        assert [type(result) for result in results[:2]] == [BrokenRequestError] * 2
        assert results[2:] == [EXPECTED] * 4


async def test_a_suspect_that_is_cancelled_lets_the_others_go_on(tokenizer: Tokenizer) -> None:
    poison = {"poison_id": POISON_ID, "poison_position": 0}
    async with serving(tokenizer, step_time_s=0.02, **poison) as up:
        healing = Healing(up, poison)
        up.driver.on_link_lost = healing.on_link_lost
        broken = up.driver.submit("broken", (POISON_ID, 1), PARAMS)
        answers = start(up, 3)
        await eventually(lambda: healing.num_losses >= 2)
        up.driver.release(broken)
        assert await asyncio.gather(*answers) == [EXPECTED] * 3


async def take_away(up: Serving, failed: bool) -> None:
    """The replica goes, before anything could make progress there, and comes again."""
    up.driver.suspend(0, "its shape is being changed", failed)
    await up.driver.attach(0, up.replicas[0].address, SECRET, [SHARD])


async def test_a_replica_that_goes_on_purpose_makes_no_request_a_suspect(slow: Serving) -> None:
    answers = start(slow, 4)
    for _ in range(3):
        await take_away(slow, failed=False)
    assert slow.driver.fleet.snapshot().replicas[0].num_live_requests == 4, "none of them has to run alone"
    assert await asyncio.gather(*answers) == [EXPECTED] * 4


async def test_a_trial_that_a_replica_leaves_on_purpose_convicts_nobody(slow: Serving) -> None:
    answers = start(slow, 2)
    for failed in (True, True, False, False, False):
        await take_away(slow, failed)
    assert slow.driver.fleet.snapshot().replicas[0].num_live_requests == 1, "a suspect runs alone"
    assert await asyncio.gather(*answers) == [EXPECTED] * 2


async def test_a_driver_that_never_had_a_replica_says_so(tokenizer: Tokenizer) -> None:
    driver = Driver("m", tokenizer, LimitsSettings(), 8)
    with pytest.raises(UnavailableError, match="no replica has been placed"):
        driver.submit("a", PROMPT, PARAMS)
