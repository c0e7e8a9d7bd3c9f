"""The real engine behind the real server: the same tokens as in process, and everything freed at the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardray import LLM, SamplingParams
from shardray.runtime.client import ServerError
from shardray.runtime.client.requests import SamplingOptions
from shardray.runtime.driver.fleet import FleetState
from shardray.runtime.engine.request import FinishReason
from shardray.runtime.model.tokenizer import Tokenizer
from tests.beam_reference import beam_search
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


SEARCH: SamplingOptions = {
    "num_beams": 4,
    "max_tokens": 40,
    "length_penalty": 0.5,
    "stop_token_ids": [*range(0, 250, 9)],
}


def found_by_transformers(folder: Path, prompt: list[int], options: SamplingOptions) -> list[int]:
    fields = {**options, "stop_token_ids": tuple(options.get("stop_token_ids") or ())}
    return beam_search(Reference(folder).model, prompt, SamplingParams(**fields))  # type: ignore[arg-type]


async def test_a_search_finds_what_transformers_finds_and_sends_it_at_its_end(
    folder: Path, replica: RealReplica
) -> None:
    prompts = random_prompts(4)
    async with serving(Tokenizer.load(folder), num_replicas=0) as up:
        await attach(up, replica)
        answers = await asyncio.gather(
            *(up.client.generate(prompt, **SEARCH) for prompt in prompts),
            up.client.generate(prompts[0], temperature=0, max_tokens=24, ignore_eos=True),
        )
        for answer, prompt in zip(answers, prompts, strict=False):
            assert answer.token_ids == found_by_transformers(folder, prompt, SEARCH)
            assert answer.usage.num_output_tokens == len(answer.token_ids)
        assert answers[-1].token_ids == Reference(folder).greedy(tuple(prompts[0]), 24)
        with pytest.raises(ServerError, match=r"sampling\.num_beams: 9 exceeds the 8 of engine\.max_num_seqs"):
            await up.client.generate("abc", num_beams=9)
        stream = asyncio.create_task(up.client.generate("abc", num_beams=8, max_tokens=900, ignore_eos=True))
        await eventually(lambda: up.driver.fleet.snapshot().replicas[0].stats.num_running == 1)
        stream.cancel()
        await all_pages_are_free(up)


async def test_a_search_outlives_its_replica_and_finds_the_same(folder: Path, replica: RealReplica) -> None:
    options: SamplingOptions = {"num_beams": 6, "max_tokens": 400, "ignore_eos": True}
    doomed, prompts = RealReplica(folder), [[5, 60, 7], [11] * 20]
    async with serving(Tokenizer.load(folder), num_replicas=0) as up:
        await attach(up, replica)
        undisturbed = [await up.client.generate(prompt, **options) for prompt in prompts]
        await attach(up, doomed)
        answers = [asyncio.create_task(up.client.generate(prompt, **options)) for prompt in prompts]
        await asyncio.sleep(0.1)  # of the better part of a second, as there are places for one search
        doomed.kill()
        await eventually(lambda: up.driver.fleet.snapshot().state is FleetState.RECOVERING)
        assert not any(answer.done() for answer in answers)
        await attach(up, replica)
        for answer, wanted in zip(await asyncio.gather(*answers), undisturbed, strict=True):
            assert (answer.token_ids, answer.text) == (wanted.token_ids, wanted.text)
        await all_pages_are_free(up)
