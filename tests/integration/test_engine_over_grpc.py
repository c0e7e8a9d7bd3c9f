"""The real engine behind the real server: the same tokens as in process, and everything freed at the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardray import LLM, SamplingParams
from shardray.runtime.client.requests import SamplingOptions
from shardray.runtime.driver.fleet import FleetState
from shardray.runtime.engine.request import FinishReason
from shardray.runtime.model.tokenizer import Tokenizer
from tests.real_replica import RealReplica
from tests.serving import Serving, eventually, serving
from tests.stub_replica import SECRET
from tests.stub_tokenizer import write_tokenizer
from tests.tiny_models import Reference, save_llama

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of one token a byte."""
    folder = save_llama(tmp_path_factory.mktemp("llama"), vocab_size=259, eos_token_id=258)
    return write_tokenizer(folder, keep_config=True)


@pytest.fixture(scope="module")
def replica(folder: Path) -> Iterator[RealReplica]:
    replica = RealReplica(folder)
    yield replica
    replica.kill()


async def attach(up: Serving, replica: RealReplica) -> None:
    await up.driver.attach(0, replica.address, SECRET, [])


def random_prompts(count: int) -> list[list[int]]:
    generator = random.Random(3)
    return [[generator.randrange(256) for _ in range(generator.randint(1, 200))] for _ in range(count)]


async def all_pages_are_free(up: Serving) -> None:
    def free() -> bool:
        stats = up.driver.fleet.snapshot().replicas[0].stats
        return stats.num_steps > 0 and stats.num_used_pages == stats.num_running == stats.num_waiting == 0

    await eventually(free)


async def test_greedy_tokens_are_those_of_transformers_for_requests_that_share_the_batch(
    folder: Path, replica: RealReplica
) -> None:
    reference = Reference(folder)
    prompts = random_prompts(8)
    async with serving(Tokenizer.load(folder), num_replicas=0) as up:
        await attach(up, replica)
        answers = await asyncio.gather(
            *(up.client.generate(prompt, temperature=0, max_tokens=24, ignore_eos=True) for prompt in prompts)
        )
        assert [a.token_ids for a in answers] == [reference.greedy(tuple(prompt), 24) for prompt in prompts]
        await all_pages_are_free(up)


async def test_sampled_tokens_and_log_probabilities_are_those_of_the_engine_in_process(
    folder: Path, replica: RealReplica
) -> None:
    prompts = random_prompts(4)
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=11, max_tokens=20, logprobs=3, frequency_penalty=0.3)
    with LLM(folder, dtype="float32", kv_memory_bytes=64 << 20, num_threads=1) as llm:
        expected = llm.generate(prompts, params)
    async with serving(Tokenizer.load(folder), num_replicas=0) as up:
        await attach(up, replica)
        for prompt, wanted in zip(prompts, expected, strict=True):
            answer = await up.client.generate(
                prompt, temperature=0.7, top_p=0.9, seed=11, max_tokens=20, logprobs=3, frequency_penalty=0.3
            )
            assert (answer.token_ids, answer.text) == (wanted.token_ids, wanted.text)
            assert [entry.chosen.logprob for entry in answer.logprobs] == pytest.approx(wanted.logprobs, abs=1e-4)


async def test_a_seed_that_the_server_drew_gives_the_same_text_again(folder: Path, replica: RealReplica) -> None:
    async with serving(Tokenizer.load(folder), num_replicas=0) as up:
        await attach(up, replica)
        first = await up.client.generate("abc", max_tokens=20)
        again = await up.client.generate("abc", max_tokens=20, seed=first.seed)
        assert first.token_ids == again.token_ids


async def test_a_cancelled_stream_frees_its_pages(folder: Path, replica: RealReplica) -> None:
    async with serving(Tokenizer.load(folder), num_replicas=0) as up:
        await attach(up, replica)
        await up.client.generate("abc", max_tokens=1)
        await all_pages_are_free(up)
        num_before = up.driver.fleet.snapshot().replicas[0].stats.num_output_tokens
        stream = up.client.stream("abc", max_tokens=900, ignore_eos=True, request_id="left")
        await anext(stream)
        await stream.aclose()
        await all_pages_are_free(up)
        assert up.driver.fleet.snapshot().replicas[0].stats.num_output_tokens - num_before < 500
        answer = await up.client.generate("abc", max_tokens=5, ignore_eos=True, request_id="left")
        assert answer.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_the_streams_of_a_killed_leader_go_on_in_another_with_the_same_tokens(
    folder: Path, replica: RealReplica, temperature: float
) -> None:
    doomed = RealReplica(folder)
    options: SamplingOptions = {
        "temperature": temperature, "seed": 5, "max_tokens": 120, "logprobs": 2, "presence_penalty": 0.4,
        "ignore_eos": True,
    }  # fmt: skip
    prompts = random_prompts(4)
    async with serving(Tokenizer.load(folder), num_replicas=0) as up:
        await attach(up, replica)
        undisturbed = [await up.client.generate(prompt, **options) for prompt in prompts]
        await attach(up, doomed)
        answers = [asyncio.create_task(up.client.generate(prompt, **options)) for prompt in prompts]
        await eventually(lambda: up.driver.fleet.snapshot().replicas[0].stats.num_output_tokens > 40)
        doomed.kill()
        await eventually(lambda: up.driver.fleet.snapshot().state is FleetState.RECOVERING)
        await attach(up, replica)
        for answer, wanted in zip(await asyncio.gather(*answers), undisturbed, strict=True):
            assert (answer.token_ids, answer.text) == (wanted.token_ids, wanted.text)
            logprobs = [[position.chosen.logprob for position in each.logprobs] for each in (answer, wanted)]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
        await all_pages_are_free(up)
