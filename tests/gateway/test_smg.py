"""The gateway smg as its package has it, between the client of OpenAI and a fleet of stub engines."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from shardray.runtime.config import GatewaySettings, LimitsSettings
from shardray.runtime.model.tokenizer import Tokenizer
from tests.gateway.conftest import Smg, until_served
from tests.serving import Serving, eventually, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
MESSAGES: Any = [{"role": "user", "content": "hi"}]
STEP_TIME_S = 0.02
ENDLESS = 400  # tokens: eight seconds at least
_numbers = itertools.count()


@dataclass
class Front:
    """A fleet behind the gateway, under a model name of its own."""

    serving: Serving
    client: openai.AsyncOpenAI
    model: str

    async def complete(self, prompt: Any = "abcd", **options: Any) -> Any:
        return await self.client.completions.create(model=self.model, prompt=prompt, **options)

    async def chat(self, **options: Any) -> Any:
        return await self.client.chat.completions.create(model=self.model, messages=MESSAGES, **options)

    async def is_idle(self) -> None:
        await eventually(lambda: self.serving.driver.fleet.snapshot().num_live_requests == 0, timeout_s=5.0)


@contextlib.asynccontextmanager
async def behind(smg: Smg, tokenizer: Tokenizer, model: str | None = None, **options: Any) -> AsyncIterator[Front]:
    model = model or f"parrot-{next(_numbers)}"
    gateway = GatewaySettings(listen="127.0.0.1:0", model_name=model, discovery_file=smg.discovery_file)
    async with openai.AsyncOpenAI(base_url=smg.base_url, api_key="none", max_retries=0, timeout=30) as client:
        async with serving(tokenizer, gateway=gateway, **options) as up:
            front = Front(up, client, model)
            await until_served(client, model)
            yield front


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(smg: Smg, tokenizer: Tokenizer) -> AsyncIterator[Front]:
    assert tokenizer.folder is not None
    elsewhere = Tokenizer.load(tokenizer.folder)
    elsewhere.folder = Path(os.path.relpath(tokenizer.folder))  # a gateway in another folder has to ask for it
    async with behind(smg, elsewhere, step_time_s=STEP_TIME_S) as up:
        yield up


async def test_completions_and_chats_have_the_text_of_the_native_client(front: Front) -> None:
    native = front.serving.client
    completion = await front.complete("abcd", max_tokens=10, temperature=0)
    assert completion.choices[0].text == (await native.generate("abcd", max_tokens=10)).text == "abcdabcdab"
    assert (completion.choices[0].finish_reason, completion.model) == ("length", front.model)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 10)
    chat = await front.chat(max_tokens=40, extra_body={"ignore_eos": True})
    expected = await native.generate(MESSAGES, max_tokens=40, ignore_eos=True)
    assert chat.choices[0].message.content == expected.text
    assert chat.usage.prompt_tokens == expected.usage.num_prompt_tokens


async def test_streams_come_token_by_token_and_tell_what_was_used(front: Front) -> None:
    stream = await front.complete("abcd", max_tokens=6, stream=True, stream_options={"include_usage": True})
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcdab"
    assert len(chunks) > 2  # what comes while a client does not read is merged
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 6)
    stream = await front.chat(max_tokens=5, stream=True, n=2, extra_body={"ignore_eos": True})
    texts = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts[0] == texts[1] == "user"  # its first token is a special one


async def test_the_options_of_openai_clients_arrive(front: Front) -> None:
    stopped = await front.complete("abcdef", max_tokens=50, stop=["de"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("abc", "stop")
    c = front.serving.driver.tokenizer.encode("c")  # type: ignore[union-attr]
    by_id = await front.complete("abcdef", max_tokens=50, extra_body={"stop_token_ids": c})
    assert (by_id.choices[0].text, by_id.choices[0].finish_reason) == ("ab", "stop")
    batch = await front.complete(["ab", "xyz"], max_tokens=3, n=2, seed=-5)
    assert [choice.text for choice in batch.choices] == ["aba", "aba", "xyz", "xyz"]
    chat = await front.chat(max_tokens=3, logprobs=True, top_logprobs=2)
    positions = chat.choices[0].logprobs.content
    assert [(position.logprob, len(position.top_logprobs)) for position in positions] == [(-0.5, 2)] * 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 100_000}, "sampling_params.max_tokens"),
        ({"prompt": "x" * 600, "max_tokens": 1}, "maximum context length is 512"),
        ({"max_tokens": 3, "stop": ["s" * 300]}, "sampling_params.stop[0]"),
        ({"max_tokens": 3, "extra_body": {"stop_token_ids": [999]}}, "sampling_params.stop_token_ids"),
        ({"max_tokens": 3, "extra_body": {"regex": "(a"}}, "sampling_params.regex"),
        ({"max_tokens": 3, "temperature": 3}, "temperature"),
    ],
)
async def test_a_bad_request_is_a_400_that_names_the_field(front: Front, options: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await front.complete(**options)
    assert named in caught.value.message
    await front.complete(max_tokens=1)


async def test_a_model_that_nobody_serves_is_a_404(front: Front) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        await front.client.completions.create(model="nobody", prompt="x")


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_a_client_that_hangs_up_frees_its_request(front: Front, num_choices: int) -> None:
    stream = await front.chat(max_tokens=ENDLESS, stream=True, n=num_choices, extra_body={"ignore_eos": True})
    async for _ in stream:
        break
    assert front.serving.driver.fleet.snapshot().num_live_requests == num_choices
    await stream.close()
    await front.is_idle()


async def test_a_full_queue_is_a_429_and_a_fleet_without_a_replica_a_503(smg: Smg, tokenizer: Tokenizer) -> None:
    limits = LimitsSettings(max_queued_requests=1)
    async with behind(smg, tokenizer, limits=limits, max_num_seqs=1, step_time_s=STEP_TIME_S) as front:
        endless = {"max_tokens": ENDLESS, "extra_body": {"ignore_eos": True}}
        running = [asyncio.ensure_future(front.complete(**endless)) for _ in range(3)]
        await eventually(lambda: front.serving.driver.fleet.snapshot().num_queued_requests == 1)
        with pytest.raises(openai.RateLimitError, match=r"limits\.max_queued_requests"):
            await front.complete(max_tokens=1)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await front.is_idle()
        front.serving.driver.give_up(0, "no room")
        with pytest.raises(openai.InternalServerError, match="no room") as caught:
            await front.complete(max_tokens=1)
        assert caught.value.status_code == 503


async def test_fleets_come_and_go_without_an_error_at_any_client(smg: Smg, tokenizer: Tokenizer) -> None:
    async with behind(smg, tokenizer, "shared", step_time_s=0.005) as front:
        enough, texts = asyncio.Event(), []

        async def ask() -> None:
            while not enough.is_set():
                texts.append((await front.complete("abcd", max_tokens=20)).choices[0].text)

        clients = [asyncio.ensure_future(ask()) for _ in range(4)]
        async with behind(smg, tokenizer, "shared", step_time_s=0.005) as other:
            await eventually(lambda: other.serving.driver.fleet.snapshot().num_live_requests > 0)
            await other.serving.server.stop(5.0)
        num_before = len(texts)
        await eventually(lambda: len(texts) > num_before + 8)
        enough.set()
        await asyncio.gather(*clients)
        assert set(texts) == {"abcd" * 5}
