"""The public services over a real socket, with leader processes behind them."""

from __future__ import annotations

import asyncio
import logging

import grpc.aio
import pytest

from shardray.runtime.client import ServerError
from shardray.runtime.config import LimitsSettings
from shardray.runtime.engine.request import FinishReason
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.v1 import inference_pb2, inference_pb2_grpc
from tests.serving import Serving, eventually, serving
from tests.stub_tokenizer import EOS_ID

pytestmark = pytest.mark.asyncio


async def nothing_runs(up: Serving) -> None:
    """No request is left in the driver, and the engine reports the same, long before a stream's own end."""

    def idle() -> bool:
        status = up.driver.fleet.snapshot()
        stats = status.replicas[0].stats
        return status.num_live_requests == 0 and 0 < stats.num_output_tokens < 100 and stats.num_running == 0

    await eventually(idle)


async def test_text_token_ids_and_chat_messages_are_continued(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        text = await up.client.generate("abc", max_tokens=7)
        assert (text.text, text.finish_reason) == ("abcabca", FinishReason.LENGTH)
        assert (text.usage.num_prompt_tokens, text.usage.num_output_tokens) == (3, 7)
        by_ids = await up.client.generate(tokenizer.encode("abc"), max_tokens=7)
        assert by_ids.token_ids == text.token_ids
        messages = [{"role": "user", "content": "hi"}]
        chat = await up.client.generate(messages, max_tokens=50, ignore_eos=True)
        assert chat.usage.num_prompt_tokens == len(tokenizer.apply_chat_template(messages))
        assert chat.text.startswith("user\nhi\nassistant\nuser")


async def test_deltas_stream_while_the_engine_works_and_the_last_says_how_it_ended(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        deltas = [
            delta async for delta in up.client.stream("abcd", max_tokens=8, seed=5, logprobs=2, request_id="mine")
        ]
        assert len(deltas) == 8
        assert {delta.request_id for delta in deltas} == {"mine"}
        assert [delta.seed for delta in deltas] == [5] + [None] * 7
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        assert [len(delta.logprobs[0].top) for delta in deltas] == [2] * 8
        timing = deltas[-1].timing
        assert timing is not None
        assert 0 <= timing.queue_s <= timing.time_to_first_token_s < timing.total_s


async def test_the_end_of_sequence_id_ends_the_text(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        answer = await up.client.generate([*tokenizer.encode("ab"), EOS_ID, 1], max_tokens=50)
        assert (answer.text, answer.token_ids[-1]) == ("ab", EOS_ID)
        assert answer.finish_reason is FinishReason.STOP


async def test_tokenize_detokenize_and_get_model_agree_with_the_tokenizer(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        assert await up.client.tokenize("héllo") == tokenizer.encode("héllo")
        messages = [{"role": "user", "content": "x"}]
        assert await up.client.tokenize(messages) == tokenizer.apply_chat_template(messages)
        assert await up.client.detokenize(tokenizer.encode("héllo")) == "héllo"
        model = await up.client.model()
        assert (model.model_id, model.vocab_size, model.max_model_len) == ("stub", 300, 512)
        assert (list(model.eos_token_ids), model.takes_text, model.takes_chat) == ([EOS_ID], True, True)
        with pytest.raises(ServerError, match="token_ids"):
            await up.client.detokenize([10_000])


async def test_a_bad_field_comes_back_in_the_details_and_reaches_no_engine(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        with pytest.raises(ServerError) as caught:
            await up.client.generate("abc", top_p=2.0)
        assert caught.value.code == "INVALID_ARGUMENT"
        assert list(caught.value.fields) == ["sampling.top_p"]
        assert caught.value.retry_after_s is None
        assert up.driver.fleet.snapshot().replicas[0].stats.num_steps == 0


async def test_a_request_id_in_use_is_refused(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        stream = up.client.stream("abc", max_tokens=400, request_id="same")
        await anext(stream)
        with pytest.raises(ServerError) as caught:
            await up.client.generate("abc", request_id="same")
        assert caught.value.code == "ALREADY_EXISTS"


async def test_abort_ends_a_stream_by_its_id_as_often_as_it_is_called(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        answer = asyncio.create_task(up.client.generate("abc", max_tokens=400, request_id="mine"))
        await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == 1)
        assert await up.client.abort("mine") is True
        assert await up.client.abort("mine") is False
        assert (await answer).finish_reason is FinishReason.ABORTED


async def test_a_client_that_cancels_frees_what_it_held_without_noise_in_the_log(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        with caplog.at_level(logging.INFO):
            stream = up.client.stream("abc", max_tokens=400)
            await anext(stream)
            await stream.aclose()
            await nothing_runs(up)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Traceback" not in capfd.readouterr().err


async def test_a_client_that_vanishes_frees_what_it_held(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        channel = grpc.aio.insecure_channel(up.address)
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(_long_request())
        await anext(aiter(call))
        await channel.close()
        await nothing_runs(up)


async def test_a_clients_deadline_ends_the_stream_and_frees_what_it_held(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        with pytest.raises(ServerError) as caught:
            await up.client.generate("abc", max_tokens=400, timeout_s=0.2)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        await nothing_runs(up)


async def test_the_servers_default_deadline_holds_for_clients_that_set_none(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, limits=LimitsSettings(default_deadline_s=0.2), step_time_s=0.02) as up:
        channel = grpc.aio.insecure_channel(up.address)
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(_long_request())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.2 s" in (caught.value.details() or "")
        await channel.close()


async def test_a_full_queue_says_when_to_try_again(tokenizer: Tokenizer) -> None:
    limits = LimitsSettings(max_queued_requests=1)
    async with serving(tokenizer, limits=limits, step_time_s=0.02, max_num_seqs=1) as up:
        tasks = [asyncio.create_task(up.client.generate("abc", max_tokens=400)) for _ in range(3)]
        await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == 3)
        with pytest.raises(ServerError) as caught:
            await up.client.generate("abc")
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert 0.25 <= (caught.value.retry_after_s or 0) <= 60.0  # from the pace of the queue
        for task in tasks:
            task.cancel()
        await nothing_runs(up)


async def test_a_slow_reader_gets_everything_in_fewer_messages(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, max_model_len=20_000, num_kv_tokens=20_000) as up:
        text, num_messages = "", 0
        prompt = "abcdefghij" * 40
        async for delta in up.client.stream(prompt, max_tokens=15_000, logprobs=20):
            text += delta.text
            num_messages += 1
            if num_messages == 1:
                await eventually(lambda: up.driver.fleet.snapshot().replicas[0].stats.num_output_tokens == 15_000)
        assert text == (prompt * 38)[:15_000]
        assert num_messages < 10_000


async def test_a_replica_that_is_given_up_ends_its_streams_as_unavailable_with_the_reason(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.01, fail_after_steps=5) as up:
        driver = up.driver
        driver.on_link_lost = lambda replica_id: driver.give_up(replica_id, driver.fleet.snapshot().reason)
        with pytest.raises(ServerError, match="stage 0, rank 1 did not answer") as caught:
            await up.client.generate("abc", max_tokens=100)
        assert caught.value.code == "UNAVAILABLE"
        assert caught.value.retry_after_s is not None


async def test_what_nobody_foresaw_is_an_internal_error_and_in_the_log(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tokenizer) as up:
        monkeypatch.setattr(up.driver, "abort", lambda request_id: 1 / 0)
        with pytest.raises(ServerError) as caught:
            await up.client.abort("x")
        assert caught.value.code == "INTERNAL"
        assert "ZeroDivisionError" not in str(caught.value)
        assert "ZeroDivisionError" in caplog.text


def _long_request() -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(text="abc")
    request.sampling.max_tokens = 400
    return request
