"""Models with an encoder behind the real server: embeddings and translations, in batches, and over a lost replica."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from shardray.runtime.client import Access, ServerError
from shardray.runtime.config import GrpcAuthSettings, GrpcSettings, LimitsSettings
from shardray.runtime.model.spec import Pooling
from shardray.runtime.model.tokenizer import Tokenizer
from tests.model.encoder_zoo import BERT, PAIRS, EncoderReference, PairReference, save_config, save_encoder
from tests.real_replica import RealReplica
from tests.serving import Serving, eventually, serving
from tests.stub_replica import SECRET
from tests.stub_tokenizer import write_tokenizer

pytestmark = pytest.mark.asyncio
T = TypeVar("T")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> EncoderReference:
    """With a tokenizer of one token a byte."""
    folder = save_config("bert", BERT | {"vocab_size": 259}, tmp_path_factory.mktemp("bert"))
    return EncoderReference(write_tokenizer(folder, keep_config=True))


@pytest.fixture(scope="module")
def replica(bert: EncoderReference) -> Iterator[RealReplica]:
    replica = RealReplica(bert.folder)
    yield replica
    replica.kill()


async def attach(up: Serving, replica: RealReplica) -> None:
    await up.driver.attach(0, replica.address, SECRET, [])


def check(found: list[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


async def test_embeddings_of_texts_and_ids_come_back_in_order(bert: EncoderReference, replica: RealReplica) -> None:
    tokenizer = Tokenizer.load(bert.folder)
    texts = [f"text number {index} {'x' * (7 * index % 40)}" for index in range(150)]
    async with serving(tokenizer, num_replicas=0) as up:
        await attach(up, replica)
        found = await up.client.embed([*texts, [5, 6, 7]])
        for text, embedding in zip(texts, found[:-1], strict=True):
            check(embedding, bert.embedding(tuple(tokenizer.encode(text)), Pooling()))
        check(found[-1], bert.embedding((5, 6, 7), Pooling()))
        [first] = await up.client.embed(["a text"], pooling="cls", normalize=True)
        check(first, bert.embedding(tuple(tokenizer.encode("a text")), Pooling("cls", normalize=True)))
        model = await up.client.model()
        assert model.encoder.max_prompt_len == 56  # 64 tokens a step, less a place for each of 8 sequences
        assert up.driver.fleet.snapshot().num_live_requests == 0


async def test_a_long_text_is_refused_by_name_or_cut_if_asked(bert: EncoderReference, replica: RealReplica) -> None:
    tokenizer = Tokenizer.load(bert.folder)
    async with serving(tokenizer, num_replicas=0) as up:
        await attach(up, replica)
        with pytest.raises(ServerError, match=r"inputs\[1\]: has 90 tokens, the model reads at most 56; .* truncate"):
            await up.client.embed(["short", "x" * 90])
        [found] = await up.client.embed(["x" * 90], truncate=True)
        check(found, bert.embedding(tuple(tokenizer.encode("x" * 56)), Pooling()))


async def test_a_bad_request_is_named_by_its_field(bert: EncoderReference, replica: RealReplica) -> None:
    async with serving(Tokenizer.load(bert.folder), num_replicas=0) as up:
        await attach(up, replica)
        for texts, options, message in [
            ([], {}, "inputs: has 0 entries, give 1 to 1024"),
            (["a"] * 1025, {}, "inputs: has 1025 entries"),
            (["a", ""], {}, r"inputs\[1\]: is empty"),
            ([[]], {}, r"inputs\[0\]: is empty"),
            ([[5, 259]], {}, r"inputs\[0\].token_ids.ids: token id 259 is outside the vocabulary"),
            (["a"], {"pooling": "max"}, "pooling: 'max' is not known; give mean, cls or last"),
            (["a"], {"priority": 101}, "priority: 101"),
        ]:
            with pytest.raises(ServerError, match=message) as caught:
                await up.client.embed(texts, **options)  # type: ignore[arg-type]
            assert caught.value.code == "INVALID_ARGUMENT"
        with pytest.raises(ServerError, match="gives embeddings, and generates no text"):
            await up.client.generate("hello")


async def most_live(up: Serving, calling: asyncio.Future[list[T]]) -> tuple[int, list[T]]:
    """Requests that were in flight at once until ``calling`` had ended, and what it gave."""
    most = 0

    async def watch() -> None:
        nonlocal most
        async for status in up.driver.fleet.watch():
            most = max(most, status.num_live_requests)

    watching = asyncio.create_task(watch())
    try:
        answers = await calling
        return most, answers
    finally:
        watching.cancel()


async def test_texts_of_a_call_that_was_let_in_wait_for_a_place(bert: EncoderReference, replica: RealReplica) -> None:
    texts = [[3 + index % 200] * (1 + index % 9) for index in range(80)]
    async with serving(None, num_replicas=0, limits=LimitsSettings(max_queued_requests=3)) as up:
        await attach(up, replica)
        for text, embedding in zip(texts, await up.client.embed(texts), strict=True):
            check(embedding, bert.embedding(tuple(text), Pooling()))


async def test_texts_of_a_call_count_for_its_caller(replica: RealReplica, tmp_path: Path) -> None:
    token, tokens = "token-of-few-0001", tmp_path / "tokens"
    tokens.write_text(f"few inference {token} max_requests=2")
    tokens.chmod(0o600)
    settings = GrpcSettings(listen="127.0.0.1:0", auth=GrpcAuthSettings(tokens=str(tokens)))
    async with serving(None, num_replicas=0, grpc=settings, access=Access(token=token)) as up:
        await attach(up, replica)
        calls = (up.client.embed([[5 + call]] * 40) for call in range(4))
        most, answers = await most_live(up, asyncio.gather(*calls, return_exceptions=True))
    assert most == 2
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(answer, ServerError) and answer.reason == "CALLER_LIMIT" for answer in refused)
    assert {len(answer) for answer in answers if isinstance(answer, list)} == {40}


async def test_an_answer_is_as_large_as_the_server_allows(tmp_path: Path) -> None:
    """What every client takes unless told otherwise is 4 MiB; the client of this package takes more."""
    shape = {"num_hidden_layers": 1, "hidden_size": 1040, "intermediate_size": 8}
    save_config("bert", BERT | shape, tmp_path)
    large = GrpcSettings(listen="127.0.0.1:0", max_message_bytes=8 << 20)
    replica = RealReplica(tmp_path)
    try:
        async with serving(None, num_replicas=0) as up:
            await attach(up, replica)
            with pytest.raises(ServerError, match=r"inputs: has 1024 entries with embeddings of 41.. bytes") as caught:
                await up.client.embed([[5]] * 1024)
            assert caught.value.code == "INVALID_ARGUMENT"
        async with serving(None, num_replicas=0, grpc=large) as up:
            await attach(up, replica)
            assert len(await up.client.embed([[5]] * 1024)) == 1024
    finally:
        replica.kill()


async def test_an_embedding_outlives_its_replica(bert: EncoderReference) -> None:
    """The replica is killed while 400 texts are on their way; another one takes over."""
    texts = [[3 + index % 200] * (1 + index % 50) for index in range(400)]
    first, second = RealReplica(bert.folder), RealReplica(bert.folder)
    try:
        async with serving(Tokenizer.load(bert.folder), num_replicas=0) as up:
            await attach(up, first)
            asking = asyncio.create_task(up.client.embed(texts))
            await eventually(lambda: up.driver.fleet.snapshot().num_live_requests > 0)
            first.kill()
            await attach(up, second)
            found = await asking
    finally:
        first.kill()
        second.kill()
    for text, embedding in zip(texts, found, strict=True):
        check(embedding, bert.embedding(tuple(text), Pooling()))


async def test_a_generating_model_refuses_to_embed_and_translates(tmp_path: Path) -> None:
    assert "m2m100" in PAIRS
    reference = PairReference(save_encoder("m2m100", tmp_path))
    prompts = [[5, 9, 33, 21], [7] * 30, [11]]
    replica = RealReplica(tmp_path)
    try:
        async with serving(None, num_replicas=0) as up:
            await attach(up, replica)
            answers = await asyncio.gather(
                *(
                    up.client.generate(prompt, temperature=0, max_tokens=12, ignore_eos=True, forced=[50])
                    for prompt in prompts
                )
            )
            assert [a.token_ids for a in answers] == [reference.greedy(tuple(p), 12, (50,)) for p in prompts]
            with pytest.raises(ServerError, match="generates text, and gives no embeddings"):
                await up.client.embed([[5]])
            with pytest.raises(ServerError, match="60 tokens, but the encoder reads at most 56; shorten it by at l"):
                await up.client.generate([7] * 60)
            with pytest.raises(ServerError, match=r"sampling\.forced\.ids"):
                await up.client.generate([7], forced=[97])
    finally:
        replica.kill()
