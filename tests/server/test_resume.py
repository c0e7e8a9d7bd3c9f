"""Streams go on when their connection is lost or their driver is killed: nothing missing, repeated or changed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from shardray.runtime.client import AsyncClient, Client, Completion, Delta, ServerError
from shardray.runtime.client.results import join, to_delta
from shardray.runtime.config import LimitsSettings
from shardray.runtime.engine.request import FinishReason
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.restartable_server import RestartableServer
from tests.serving import Serving, eventually, serving
from tests.stub_replica import StubReplica
from tests.stub_tokenizer import write_tokenizer

pytestmark = pytest.mark.asyncio
TEXT = "naïve ☕ café, 日本語 and 🎉 — "
# What a client can write, with a seed each so that two answers can be compared.
CASES: list[dict[str, Any]] = [
    {"prompt": TEXT, "max_tokens": 90, "logprobs": 3, "seed": 2**64 - 1},
    {"prompt": "abcdefgh" * 10, "max_tokens": 100, "stop": ["habcdefghabcdefgX", "nothing"], "seed": 1},
    {"prompt": "x" * 45 + "END and more", "max_tokens": 200, "stop": ["END"], "logprobs": 0, "seed": 2},
    {"prompt": [{"role": "user", "content": TEXT}], "max_tokens": 100, "ignore_eos": True, "seed": 3},
    *({"prompt": f"{number} " + TEXT, "max_tokens": 60 + number, "seed": number} for number in range(20)),
]


@pytest.fixture(scope="module")
def replica() -> Iterator[StubReplica]:
    replica = StubReplica(step_time_s=0.01, max_num_seqs=64, max_model_len=4096, num_kv_tokens=100_000)
    yield replica
    replica.kill()


@pytest.fixture
def server(replica: StubReplica, tmp_path: Path) -> Iterator[RestartableServer]:
    """With a journal on disk."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    server = RestartableServer(folder, [replica.address], tmp_path / "journal.db", max_num_seqs=64)
    yield server
    server.kill()


@pytest_asyncio.fixture
async def client(server: RestartableServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout_s=60) as client:
        yield client


@pytest_asyncio.fixture
async def slow(tokenizer: Tokenizer) -> AsyncIterator[Serving]:
    """A server in this process, without a journal on disk."""
    async with serving(tokenizer, step_time_s=0.02) as up:
        yield up


class RawClient:
    """Calls without any help; ``lose`` breaks its connection."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def submit(
        self, request_id: str, max_tokens: int = 40, resumable_s: float = 20.0
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        request = inference_pb2.GenerateRequest(request_id=request_id, text="abcdef", resumable_s=resumable_s)
        request.sampling.max_tokens = max_tokens
        async for response in self._stub.Generate(request):
            yield response

    async def resume(self, request_id: str, num_tokens: int = 0, num_chars: int = 0) -> list[Delta]:
        seen = inference_pb2.ResumePoint(num_tokens=num_tokens, num_chars=num_chars)
        request = inference_pb2.GenerateRequest(request_id=request_id, resume=seen)
        return [to_delta(response) async for response in self._stub.Generate(request)]

    async def lose(self) -> None:
        await self._channel.close()


@contextlib.asynccontextmanager
async def raw(address: str) -> AsyncIterator[RawClient]:
    client = RawClient(address)
    yield client
    await client.lose()


def what_is_seen(answer: Completion) -> tuple[object, ...]:
    """All but the times."""
    logprobs = [str(position) for position in answer.logprobs]
    return answer.text, answer.token_ids, logprobs, answer.finish_reason, str(answer.usage), answer.seed


async def read(client: AsyncClient, reached: asyncio.Event, num_tokens: int, case: dict[str, Any]) -> Completion:
    """Tells when it has ``num_tokens``."""
    deltas: list[Delta] = []
    async for delta in client.stream(**case):
        deltas.append(delta)
        if sum(len(delta.token_ids) for delta in deltas) >= num_tokens:
            reached.set()
    return join(deltas)


async def num_live(up: Serving, expected: int) -> None:
    await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == expected)


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_driver_that_is_started_again_is_a_pause_in_all_of_its_streams(
    server: RestartableServer, client: AsyncClient, end: str
) -> None:
    undisturbed = await asyncio.gather(*(client.generate(**case) for case in CASES))
    marks = [asyncio.Event() for _ in CASES]
    tasks = [
        asyncio.create_task(read(client, mark, 30 + index % 9, case))
        for index, (mark, case) in enumerate(zip(marks, CASES, strict=True))
    ]
    await asyncio.gather(*(mark.wait() for mark in marks))
    await asyncio.to_thread(getattr(server, end))
    await asyncio.to_thread(server.start)
    answers = await asyncio.gather(*tasks)
    assert list(map(what_is_seen, answers)) == list(map(what_is_seen, undisturbed))
    times = answers[0].timing
    assert 0 <= times.queue_s <= times.time_to_first_token_s < times.total_s


async def test_a_driver_that_is_killed_again_and_again_changes_nothing(
    server: RestartableServer, client: AsyncClient
) -> None:
    case = {"prompt": TEXT, "max_tokens": 200, "logprobs": 2, "seed": 4}
    undisturbed = await client.generate(**case)  # type: ignore[arg-type]
    answer = asyncio.create_task(client.generate(**case))  # type: ignore[arg-type]
    for _ in range(3):
        await asyncio.sleep(0.4)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
    assert what_is_seen(await answer) == what_is_seen(undisturbed)


async def test_the_blocking_client_goes_on_as_well(server: RestartableServer) -> None:
    with Client(server.address, timeout_s=60) as client:
        undisturbed = client.generate(TEXT, max_tokens=120, seed=5)
        stream = client.stream(TEXT, max_tokens=120, seed=5)
        deltas = [next(stream)]
        server.kill()
        restart = threading.Thread(target=server.start)
        restart.start()
        deltas += stream
        restart.join()
        assert what_is_seen(join(deltas)) == what_is_seen(undisturbed)


async def test_requests_in_the_queue_outlive_the_driver_and_keep_their_deadline(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    slow_replica = StubReplica(step_time_s=0.03, max_num_seqs=1)
    server = RestartableServer(folder, [slow_replica.address], tmp_path / "journal.db", max_num_seqs=1)
    try:
        async with AsyncClient(server.address) as client:
            tasks = [asyncio.create_task(client.generate("abc", max_tokens=40, timeout_s=60)) for _ in range(6)]
            late = asyncio.create_task(client.generate("abc", max_tokens=40, timeout_s=5, priority=100))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            started_s = time.monotonic()
            with pytest.raises(ServerError) as caught:
                await late
            assert caught.value.code == "DEADLINE_EXCEEDED"
            assert time.monotonic() - started_s < 5
            assert [len(answer.token_ids) for answer in await asyncio.gather(*tasks)] == [40] * 6
    finally:
        server.kill()
        slow_replica.kill()


async def test_a_client_that_comes_back_after_the_end_gets_the_rest_also_from_another_driver(
    server: RestartableServer,
) -> None:
    async with raw(server.address) as first:
        responses = first.submit("mine")
        seen = [to_delta(await anext(responses)) for _ in range(12)]
        await first.lose()
    num_tokens = sum(len(delta.token_ids) for delta in seen)
    num_chars = sum(len(delta.text) for delta in seen)
    assert num_tokens > 5
    await asyncio.sleep(1.0)  # it ends without its client
    for _ in range(2):
        async with raw(server.address) as second:
            rest = await second.resume("mine", num_tokens, num_chars)
        answer = join([*seen, *rest])
        assert (answer.text, answer.finish_reason) == (("abcdef" * 7)[:40], FinishReason.LENGTH)
        assert (len(answer.token_ids), answer.usage.num_output_tokens) == (40, 40)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)


async def test_a_lost_connection_to_a_server_that_lives_is_a_pause(slow: Serving) -> None:
    relay = _Relay(slow.address)
    async with relay, AsyncClient(relay.address) as client:
        stream = client.stream("abcdef", max_tokens=60, logprobs=1)
        deltas = []
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) in (10, 20, 30):
                relay.cut()
        answer = join(deltas)
        assert answer.text == "abcdef" * 10
        assert [position.chosen.token_id for position in answer.logprobs] == answer.token_ids
        assert relay.num_connections == 4


async def test_a_request_is_kept_for_a_client_that_is_away_no_longer_than_it_asked(slow: Serving) -> None:
    async with raw(slow.address) as first:
        await anext(first.submit("kept", max_tokens=400, resumable_s=2.0))
        await anext(first.submit("not kept", max_tokens=400, resumable_s=0.0))
        await num_live(slow, 2)
    await num_live(slow, 1)
    await asyncio.sleep(0.3)
    assert slow.driver.fleet.snapshot().num_live_requests == 1
    await num_live(slow, 0)
    async with raw(slow.address) as second:
        for request_id in ("kept", "not kept"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await second.resume(request_id)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_client_that_closes_its_stream_frees_what_it_held_at_once(slow: Serving) -> None:
    async with AsyncClient(slow.address) as client:
        stream = client.stream("abc", max_tokens=400)
        await anext(stream)
        await stream.aclose()
        await num_live(slow, 0)
        task = asyncio.create_task(client.generate("abc", max_tokens=400))
        await num_live(slow, 1)
        task.cancel()
        await num_live(slow, 0)
        left_open = client.stream("abc", max_tokens=400)
        await anext(left_open)
        await num_live(slow, 1)
    await num_live(slow, 0)


async def test_a_second_client_takes_the_stream_over_from_the_first(slow: Serving) -> None:
    async with raw(slow.address) as first, raw(slow.address) as second:
        responses = first.submit("mine")
        await anext(responses)
        await anext(responses)
        taking = asyncio.create_task(second.resume("mine"))
        with pytest.raises(grpc.aio.AioRpcError, match="another client resumed") as caught:
            async for _ in responses:
                pass
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert join(await taking).text == ("abcdef" * 7)[:40]


async def test_a_resumable_request_is_acknowledged_before_its_first_token(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, max_num_seqs=1, step_time_s=0.05) as up, raw(up.address) as client:
        streams = [client.submit(str(number), max_tokens=100) for number in range(3)]
        for number, stream in enumerate(streams):
            delta = to_delta(await anext(stream))
            assert (delta.request_id, delta.token_ids) == (str(number), [])
            assert delta.seed is not None
        assert up.driver.fleet.snapshot().num_queued_requests == 1


@pytest.mark.parametrize(
    ("field", "request_", "message"),
    [
        ("request_id", inference_pb2.GenerateRequest(), "empty"),
        ("text", inference_pb2.GenerateRequest(request_id="a", text="abc"), "unset"),
        ("chat", inference_pb2.GenerateRequest(request_id="a", chat=inference_pb2.ChatMessages()), "unset"),
        ("sampling", inference_pb2.GenerateRequest(request_id="a", sampling=common_pb2.SamplingParameters()), "unset"),
        ("priority", inference_pb2.GenerateRequest(request_id="a", priority=1), "unset"),
        ("resumable_s", inference_pb2.GenerateRequest(request_id="a", resumable_s=1), "unset"),
        ("resume.num_tokens", inference_pb2.GenerateRequest(request_id="live"), "99 exceeds its max_tokens 40"),
        ("resume", inference_pb2.GenerateRequest(request_id="plain"), "without resumable_s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_resume_that_makes_no_sense_is_refused_by_name(
    slow: Serving, field: str, request_: inference_pb2.GenerateRequest, message: str
) -> None:
    async with raw(slow.address) as client:
        streams = [client.submit("live"), client.submit("plain", resumable_s=0)]
        for stream in streams:
            await anext(stream)
        request_.resume.num_tokens = 99 if request_.request_id == "live" else 0
        request_.resume.SetInParent()
        with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: .*{message}") as caught:
            async for _ in client._stub.Generate(request_):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("resumable_s", [-1.0, float("nan"), float("inf")])
async def test_a_duration_that_is_none_is_refused(slow: Serving, resumable_s: float) -> None:
    async with raw(slow.address) as client:
        with pytest.raises(grpc.aio.AioRpcError, match=r"resumable_s: .* is no duration"):
            await anext(client.submit("a", resumable_s=resumable_s))


async def test_without_a_journal_on_disk_a_killed_driver_is_an_error_that_says_so(
    replica: StubReplica, tmp_path: Path
) -> None:
    server = RestartableServer(write_tokenizer(tmp_path / "tokenizer"), [replica.address], None)
    try:
        async with AsyncClient(server.address) as client:
            stream = client.stream("abc", max_tokens=400)
            await anext(stream)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            with pytest.raises(ServerError, match="the server does not know the request any longer") as caught:
                async for _ in stream:
                    pass
            assert caught.value.code == "UNAVAILABLE"
            giving_up = client.stream("abc", max_tokens=400, resumable_s=0.5)
            await anext(giving_up)
            await asyncio.to_thread(server.kill)
            started_s = time.monotonic()
            with pytest.raises(ServerError, match=r"tried again for 0\.5 s"):
                async for _ in giving_up:
                    pass
            assert 0.5 < time.monotonic() - started_s < 3
            await asyncio.to_thread(server.start)
    finally:
        server.kill()


async def test_a_client_that_wants_to_wait_outwaits_a_server_that_is_not_there_loads_or_is_full(
    server: RestartableServer, client: AsyncClient, tokenizer: Tokenizer
) -> None:
    await asyncio.to_thread(server.kill)
    with pytest.raises(ServerError, match="no answer"):
        await client.generate("abc", max_tokens=3)
    waiting = asyncio.create_task(client.generate("abc", max_tokens=3, wait_s=30))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(server.start)
    assert (await waiting).text == "abc"
    async with serving(tokenizer, limits=LimitsSettings(max_queued_requests=1), max_num_seqs=1, step_time_s=0.02) as up:
        running = [asyncio.create_task(up.client.generate("abc", max_tokens=40)) for _ in range(3)]
        await num_live(up, 3)
        with pytest.raises(ServerError, match="max_queued_requests"):
            await up.client.generate("abc", max_tokens=3)
        assert (await up.client.generate("abc", max_tokens=3, wait_s=30)).text == "abc"
        await asyncio.gather(*running)


class _Relay:
    """Carries bytes between clients and a server until it cuts a connection, as a network does."""

    def __init__(self, target: str) -> None:
        self._target = target.rsplit(":", 1)
        self._writers: set[asyncio.StreamWriter] = set()
        self.num_connections = 0

    async def __aenter__(self) -> _Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cut()
        self._server.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        other_reader, other_writer = await asyncio.open_connection(self._target[0], int(self._target[1]))
        self._writers |= {writer, other_writer}
        await asyncio.gather(self._carry(reader, other_writer), self._carry(other_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
