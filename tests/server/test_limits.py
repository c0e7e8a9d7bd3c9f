"""Over the limit: refused at once, with the time to try again, while what runs keeps its pace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from statistics import quantiles

import pytest
import pytest_asyncio

from shardray.runtime.client import ServerError
from shardray.runtime.config import LimitsSettings
from shardray.runtime.model.tokenizer import Tokenizer
from tests.serving import Serving, eventually, serving

pytestmark = pytest.mark.asyncio
NUM_RUNNING = 2  # of a fleet that runs one: the next one is on the replica, too
STEP_TIME_S = 0.02


@pytest_asyncio.fixture
async def busy(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> AsyncIterator[Serving]:
    """A fleet with no place left, and with the limits of the test's parameter."""
    async with serving(
        tokenizer, limits=LimitsSettings(**request.param), max_num_seqs=1, step_time_s=STEP_TIME_S
    ) as up:
        running = [asyncio.ensure_future(ask(up, "abc", 500)) for _ in range(NUM_RUNNING)]
        await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == NUM_RUNNING)
        yield up
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def ask(up: Serving, prompt: str, max_tokens: int = 1) -> None:
    await up.client.generate(prompt, max_tokens=max_tokens, ignore_eos=True, resumable_s=0)


async def queue(up: Serving, *prompts: str) -> asyncio.Future[list[None]]:
    before = up.driver.fleet.snapshot().num_queued_requests
    waiting = asyncio.gather(*(ask(up, prompt) for prompt in prompts))
    await eventually(lambda: up.driver.fleet.snapshot().num_queued_requests == before + len(prompts))
    return waiting


async def refusal(up: Serving, prompt: str = "abc") -> ServerError:
    with pytest.raises(ServerError) as caught:
        await ask(up, prompt)
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert caught.value.retry_after_s is not None
    return caught.value


@pytest.mark.parametrize("busy", [{"max_queued_tokens": 100}], indirect=True)
async def test_tokens_that_wait_are_bounded_as_requests_are(busy: Serving) -> None:
    waiting = await queue(busy, "a" * 60)
    waiting_too = await queue(busy, "b" * 60)
    assert "requests of 120 tokens are waiting, the most that limits.max_queued_tokens allows" in str(
        await refusal(busy, "c")
    )
    waiting.cancel()
    await eventually(lambda: busy.driver.fleet.snapshot().num_queued_requests == 1)
    last = await queue(busy, "c")
    for one in (waiting_too, last):
        one.cancel()


@pytest.mark.parametrize("busy", [{"max_queued_requests": 2}], indirect=True)
async def test_a_refusal_takes_no_10_ms_whatever_the_prompt_and_changes_no_pace(busy: Serving) -> None:
    waiting = await queue(busy, "a", "b")
    num_tokens = await num_output_tokens(busy)
    began_s, times_s = time.monotonic(), []
    while time.monotonic() < began_s + 0.7:
        asked_s = time.monotonic()
        await refusal(busy, "word " * 5000)  # too long for the model, and not even looked at
        times_s.append(time.monotonic() - asked_s)
    num_steps = await num_output_tokens(busy) - num_tokens
    # Of the quicker half: the slower one tells of who else uses this machine.
    assert quantiles(times_s, n=4)[0] < 0.010
    assert num_steps > 0.5 * (time.monotonic() - began_s) / STEP_TIME_S
    waiting.cancel()


async def num_output_tokens(up: Serving) -> int:
    """As the replica counts them, when it next does."""
    before = up.driver.fleet.snapshot().replicas[0].stats
    await eventually(lambda: up.driver.fleet.snapshot().replicas[0].stats is not before)
    return up.driver.fleet.snapshot().replicas[0].stats.num_output_tokens
