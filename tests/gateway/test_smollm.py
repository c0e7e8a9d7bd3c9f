"""A real model behind smg: what the client of OpenAI gets is what the native client gets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
import jsonschema
import openai
import pytest
import pytest_asyncio
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from shardray.runtime.client import AsyncClient
from shardray.runtime.config import GatewaySettings
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer
from tests.gateway.conftest import Smg, until_served
from tests.real_replica import RealReplica
from tests.serving import Serving, serving
from tests.stub_replica import SECRET

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "shade": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["colour", "shade"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def replica() -> Iterator[RealReplica]:
    replica = RealReplica(resolve_model(MODEL), max_model_len=512)
    yield replica
    replica.kill()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(smg: Smg, replica: RealReplica) -> AsyncIterator[Serving]:
    gateway = GatewaySettings(listen="127.0.0.1:0", model_name=MODEL, discovery_file=smg.discovery_file)
    async with serving(Tokenizer.load(resolve_model(MODEL)), num_replicas=0, gateway=gateway) as up:
        await up.driver.attach(0, replica.address, SECRET, [])
        yield up


@pytest.fixture(scope="module")
def native(up: Serving) -> AsyncClient:
    return up.client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(smg: Smg, native: AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=smg.base_url, api_key="none", max_retries=0, timeout=120) as client:
        await until_served(client, MODEL)
        yield client


async def test_greedy_tokens_of_completions_and_streams_are_those_of_the_native_client(
    client: openai.AsyncOpenAI, native: AsyncClient
) -> None:
    expected = await native.generate(PROMPT, max_tokens=8, temperature=0)
    options: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    completion = await client.completions.create(**options)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (expected.text, "length")
    stream = await client.completions.create(**options, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == expected.text


async def test_a_chat_has_the_prompt_the_tokens_and_the_logprobs_of_the_native_client(
    client: openai.AsyncOpenAI, native: AsyncClient
) -> None:
    expected = await native.generate(MESSAGES, max_tokens=8, temperature=0, logprobs=3)
    chat = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == expected.usage.num_prompt_tokens
    assert chat.choices[0].message.content == expected.text
    assert chat.choices[0].logprobs is not None
    positions = chat.choices[0].logprobs.content or []
    told = [(one.logprob, [top.logprob for top in one.top_logprobs]) for one in positions]
    wanted = [(one.chosen.logprob, [top.logprob for top in one.top]) for one in expected.logprobs]
    assert [one for one, _ in told] == pytest.approx([one for one, _ in wanted], abs=1e-4)
    assert [one for _, top in told for one in top] == pytest.approx([one for _, top in wanted for one in top], abs=1e-4)


async def test_a_seed_gives_the_sample_of_the_native_client_and_each_choice_one_of_its_own(
    client: openai.AsyncOpenAI, native: AsyncClient
) -> None:
    options: Any = {"max_tokens": 6, "temperature": 0.9, "top_p": 0.95}
    expected = [(await native.generate(PROMPT, seed=seed, **options)).text for seed in (7, 8)]
    completion = await client.completions.create(model=MODEL, prompt=PROMPT, seed=7, n=2, **options)
    assert [choice.text for choice in completion.choices] == expected
    assert expected[0] != expected[1]


async def test_stop_strings_cut_where_the_native_client_is_cut(client: openai.AsyncOpenAI, native: AsyncClient) -> None:
    prompt, stop = "One, two, three, four,", [" six"]
    expected = await native.generate(prompt, max_tokens=12, temperature=0, stop=stop)
    completion = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0, stop=stop)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (expected.text, "stop")


async def test_a_response_format_is_kept_and_has_the_tokens_of_the_native_client(
    client: openai.AsyncOpenAI, native: AsyncClient
) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
    expected = await native.generate(MESSAGES, max_tokens=60, temperature=0, json_schema=SCHEMA)
    chat = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=60, temperature=0, response_format=schema
    )
    assert chat.choices[0].message.content == expected.text
    assert chat.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(expected.text), SCHEMA)
    expected = await native.generate(MESSAGES, max_tokens=40, temperature=0, json_schema={"type": "object"})
    chat = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=40, temperature=0, response_format={"type": "json_object"}
    )
    assert chat.choices[0].message.content == expected.text
    assert expected.text.startswith("{")


async def test_a_schema_that_cannot_be_kept_is_a_400_that_says_why(client: openai.AsyncOpenAI) -> None:
    unkept: Any = {"name": "set", "schema": {"type": "array", "uniqueItems": True}}
    schema: Any = {"type": "json_schema", "json_schema": unkept}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=schema)


async def test_a_tool_that_has_to_be_called_is_called_with_the_arguments_that_it_takes(
    client: openai.AsyncOpenAI,
) -> None:
    tool: Any = {"type": "function", "function": {"name": "paint", "description": "Paint it.", "parameters": SCHEMA}}
    chat = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=80, temperature=0, tools=[tool],
        tool_choice={"type": "function", "function": {"name": "paint"}},
    )  # fmt: skip
    [call] = chat.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "paint"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


async def test_regular_expressions_and_grammars_come_through(client: openai.AsyncOpenAI, native: AsyncClient) -> None:
    for name, given in (("regex", "[A-Z][a-z]{2,9}[.]"), ("ebnf", 'root ::= "It is " ("red" | "blue") "."')):
        constraint: Any = {"regex" if name == "regex" else "grammar": given}
        expected = await native.generate(PROMPT, max_tokens=20, temperature=0, **constraint)
        completion = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0, extra_body={name: given}
        )
        assert (completion.choices[0].text, completion.choices[0].finish_reason) == (expected.text, "stop")


@pytest.mark.slow
async def test_langchain_gets_what_a_schema_asks_for(smg: Smg, client: openai.AsyncOpenAI) -> None:
    from langchain_openai import ChatOpenAI  # two seconds

    chat = ChatOpenAI(model=MODEL, base_url=smg.base_url, api_key="none", temperature=0, max_completion_tokens=80)
    answer = await chat.with_structured_output({"title": "Colour", **SCHEMA}).ainvoke(MESSAGES)
    jsonschema.validate(answer, SCHEMA)


@pytest.mark.slow
async def test_langchain_gets_the_same_answer_whole_and_in_parts(
    smg: Smg, client: openai.AsyncOpenAI, native: AsyncClient
) -> None:
    from langchain_openai import ChatOpenAI  # two seconds

    expected = await native.generate(MESSAGES, max_tokens=8, temperature=0)
    chat = ChatOpenAI(model=MODEL, base_url=smg.base_url, api_key="none", temperature=0, max_completion_tokens=8)
    assert (await chat.ainvoke(MESSAGES)).content == expected.text
    assert "".join([str(part.content) async for part in chat.astream(MESSAGES)]) == expected.text


async def test_tokens_of_a_prompt_that_were_computed_before_are_told(
    client: openai.AsyncOpenAI, native: AsyncClient
) -> None:
    prompt = "Once upon a time there was a river, and by the river there stood a mill; " * 3
    options: Any = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    first = await client.completions.create(**options)
    again = await native.generate(prompt, max_tokens=4, temperature=0)
    assert first.usage is not None
    num_blocks = (first.usage.prompt_tokens - 1) // 16
    assert num_blocks > 2
    assert again.usage.num_cached_prompt_tokens == 16 * num_blocks
    assert again.text == first.choices[0].text
    chat: Any = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 4}
    answers = [await client.chat.completions.create(**chat, temperature=0) for _ in range(2)]
    assert answers[1].usage is not None
    assert answers[1].usage.prompt_tokens_details is not None
    assert (answers[1].usage.prompt_tokens_details.cached_tokens or 0) >= 16 * num_blocks


async def test_a_gateway_can_have_what_was_computed_forgotten(up: Serving) -> None:
    prompt = "The sun rose over the hills, and the hills were as they had been; " * 3
    found = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{up.server.gateway_port}") as channel:
        engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        for forgets in (False, False, True):
            if forgets:
                assert (await engine.FlushCache(common_pb2.FlushCacheRequest())).success
            found.append((await up.client.generate(prompt, max_tokens=2)).usage.num_cached_prompt_tokens)
    assert (found[0], found[2]) == (0, 0)
    assert found[1] > 32
