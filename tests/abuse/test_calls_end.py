"""Whatever a client does, its call ends, and the driver is left with the tasks that it had."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import pytest

from shardray.runtime.config import LimitsSettings
from shardray.runtime.driver.operations import OperationRefusedError
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.status import to_status
from shardray.v1 import common_pb2, inference_pb2
from tests.abuse.http2 import Connection, Kind, call, take
from tests.abuse.values import GENERATE, ask, connect
from tests.abuse.vanish import attack as vanish
from tests.serving import Serving, eventually, serving
from tests.stub_tokenizer import write_tokenizer

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def tasks() -> Counter[str]:
    return Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())


async def settle(up: Serving) -> None:
    """One request through everything, so that what is made once is there."""
    await up.client.generate("abc", max_tokens=2, resumable_s=0)


@pytest.mark.parametrize("num_clients", [200, pytest.param(1000, marks=pytest.mark.slow)])
async def test_clients_that_vanish_leave_no_task(tokenizer: Tokenizer, num_clients: int) -> None:
    async with serving(tokenizer, step_time_s=0.002, max_model_len=2000, num_kv_tokens=100_000) as up:
        await settle(up)
        before = tasks()
        ways = await vanish(up.address, asyncio.Queue(), num_clients=num_clients, at_once=40)
        assert sum(ways.values()) == num_clients
        await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == 0)
        await eventually(lambda: not tasks() - before)


async def test_a_client_that_keeps_its_connection_and_does_not_read_is_given_up(tokenizer: Tokenizer) -> None:
    limits = LimitsSettings(default_deadline_s=1.0)
    request = inference_pb2.GenerateRequest(
        text="abc", sampling=common_pb2.SamplingParameters(max_tokens=3000, logprobs=20, ignore_eos=True)
    ).SerializeToString()
    async with serving(tokenizer, limits=limits, max_model_len=4000, num_kv_tokens=4000) as up:
        await settle(up)
        connection = await Connection.open(up.address)
        await connection.send(call(1, request))
        await eventually(lambda: tasks()["_handle_exceptions"] == 1)
        await eventually(lambda: tasks()["_handle_exceptions"] == 0)
        assert up.driver.fleet.snapshot().num_live_requests == 0
        await connection.send(take(1, 10_000_000))
        async with asyncio.timeout(5):  # what was sent before is there still, and then why no more follows
            while not (received := await connection.next()).ends_stream:
                await connection.answer(received)
        assert received.kind == Kind.HEADERS
        assert b"took no message for 1 s" in received.payload.replace(b"%20", b" ")
        connection.reset()


async def test_a_message_that_cannot_be_read_is_the_clients_error_and_no_noise(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tokenizer) as up:
        with connect(up.address) as channel:
            for method in (GENERATE, "InferenceService/Tokenize", "ControlService/WatchFleet"):
                code, details = await asyncio.to_thread(ask, channel, method, b"\xfb\x7f\x01")
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert "not a message of this method" in details
    assert caplog.records == []


async def test_a_status_fits_into_a_header_whatever_it_quotes() -> None:
    status = to_status(OperationRefusedError("\U0001f4a5" * 4000))
    assert len(status.details.encode()) * 3 + len(status.trailing_metadata[0][1]) * 4 / 3 < 8192
