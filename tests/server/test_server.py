"""Health, reflection, the fleet, ports, and the server's end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shardray.runtime.client import ServerError
from shardray.runtime.config import GrpcSettings, LimitsSettings
from shardray.runtime.driver.driver import Driver
from shardray.runtime.engine.assignment import ShardLoad
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.listen import ListenError
from shardray.runtime.server.server import Server
from shardray.v1 import control_pb2
from tests.serving import SHARD, Serving, serving

pytestmark = pytest.mark.asyncio
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
INFERENCE, CONTROL = "shardray.v1.InferenceService", "shardray.v1.ControlService"


_RAISE = """
import resource
from shardray.runtime.server.listen import raise_file_limit
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
raise_file_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


async def test_connections_are_not_limited_by_the_soft_limit_of_open_files() -> None:
    assert (await (await asyncio.create_subprocess_exec(sys.executable, "-c", _RAISE)).wait()) == 0


async def health(up: Serving, service: str = "") -> int:
    async with grpc.aio.insecure_channel(up.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)


async def until_health(up: Serving, expected: int) -> None:
    async with asyncio.timeout(5):
        while await health(up) != expected:
            await asyncio.sleep(0.01)


async def services(up: Serving) -> list[str]:
    async with grpc.aio.insecure_channel(up.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        response = await anext(aiter(call))
        return [service.name for service in response.list_services_response.service]


async def test_a_loading_server_is_up_not_serving_and_says_when_to_try_again(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=0) as up:
        up.driver.fleet.set_loading(0, "loading weights", 0.5)
        assert await health(up) == await health(up, INFERENCE) == NOT_SERVING
        assert await health(up, CONTROL) == SERVING
        with pytest.raises(ServerError, match="loading weights") as caught:
            await up.client.generate("abc")
        assert (caught.value.code, caught.value.retry_after_s) == ("UNAVAILABLE", 2.0)
        fleet = await up.client.fleet()
        assert fleet.state == control_pb2.FLEET_STATE_LOADING
        assert (fleet.replicas[0].reason, fleet.replicas[0].progress) == ("loading weights", 0.5)
        with pytest.raises(ServerError, match="not ready within"):
            await up.client.wait_ready(timeout_s=0.2)


async def test_health_follows_the_fleet(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        await until_health(up, SERVING)
        assert await health(up, INFERENCE) == SERVING
        await up.client.wait_ready(timeout_s=1)
        up.driver.suspend(0, "lost", failed=True)
        await asyncio.sleep(0.1)
        assert await health(up, INFERENCE) == SERVING, "requests are taken while it is formed again"
        up.driver.fleet.set_loading(0, "no room for its hosts")
        await until_health(up, NOT_SERVING)
        assert await health(up, CONTROL) == SERVING


async def test_the_fleet_lists_each_shard_with_what_it_holds(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        fleet = await up.client.fleet()
        [shard] = fleet.replicas[0].shards
        assert {field.name for field in shard.DESCRIPTOR.fields} - {"load"} == set(SHARD.__struct_fields__)
        assert not shard.HasField("load")
        assert (shard.host, shard.num_heads, shard.kv_bytes) == (SHARD.host, SHARD.num_heads, SHARD.kv_bytes)
        assert fleet.start_time.seconds > 0
        assert fleet.replicas[0].state_time.seconds > 0
        up.driver.fleet.set_load(0, 0, ShardLoad(num_steps=2, busy_s=0.5, memory_bytes=9))
        [shard] = (await up.client.fleet()).replicas[0].shards
        assert (shard.load.num_steps, shard.load.busy_s, shard.load.memory_bytes) == (2, 0.5, 9)


async def test_a_watch_tells_of_changes_and_ends_with_the_server(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        watch = up.client.watch_fleet(min_interval_s=0.001)
        assert (await anext(watch)).state == control_pb2.FLEET_STATE_READY
        up.driver.fleet.set_failed(0, "lost")
        async for fleet in watch:
            if fleet.state == control_pb2.FLEET_STATE_FAILED:
                break
        await up.server.stop(0)
        with contextlib.suppress(ServerError):  # the end may come as a status or as the end of the stream
            states = [fleet.state async for fleet in watch]
            assert states[-1:] in ([], [control_pb2.FLEET_STATE_STOPPING])


async def test_a_watch_interval_beyond_a_minute_is_refused(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        with pytest.raises(ServerError, match="min_interval_ms"):
            await anext(up.client.watch_fleet(min_interval_s=61))


async def test_reflection_can_be_switched_off(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=0) as up:
        assert {INFERENCE, CONTROL, "grpc.health.v1.Health"} <= set(await services(up))
    closed = GrpcSettings(listen="127.0.0.1:0", reflection=False)
    async with serving(tokenizer, num_replicas=0, grpc=closed) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(up)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_one_line_with_the_fix(tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    async with serving(tokenizer, num_replicas=0) as up:
        second = Server(GrpcSettings(listen=up.address), Driver("m", tokenizer, LimitsSettings(), 1))
        with pytest.raises(ListenError, match=r"another process listens there; .* --set grpc\.listen=127") as caught:
            await second.start()
        assert up.address in str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


async def test_an_address_of_another_machine_is_refused_as_such() -> None:
    server = Server(
        GrpcSettings(listen="192.0.2.1:5000", allow_unauthenticated=True), Driver("m", None, LimitsSettings(), 1)
    )
    with pytest.raises(ListenError, match="no such address"):
        await server.start()


async def test_a_message_beyond_the_limit_is_refused(tokenizer: Tokenizer) -> None:
    small = GrpcSettings(listen="127.0.0.1:0", max_message_bytes=10_000)
    async with serving(tokenizer, grpc=small) as up:
        with pytest.raises(ServerError) as caught:
            await up.client.generate("a" * 20_000)
        assert caught.value.code == "RESOURCE_EXHAUSTED"


async def test_a_stop_lets_streams_end_and_refuses_new_requests(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        await until_health(up, SERVING)
        stream = up.client.stream("abc", max_tokens=30)
        await anext(stream)
        stopping = asyncio.create_task(up.server.stop(10))
        await until_health(up, NOT_SERVING)
        with pytest.raises(ServerError, match="shutting down") as caught:
            await up.client.generate("abc")
        assert (caught.value.code, caught.value.retry_after_s) == ("UNAVAILABLE", 2.0)
        rest = [delta async for delta in stream]
        assert rest[-1].usage is not None
        assert rest[-1].usage.num_output_tokens == 30
        await asyncio.wait_for(stopping, 5)
        with pytest.raises(ServerError, match="is `shardray serve` running there"):
            await up.client.fleet()


async def test_a_stop_fails_what_outlives_the_grace(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, step_time_s=0.02) as up:
        stream = up.client.stream("abc", max_tokens=400)
        await anext(stream)
        stopping = asyncio.create_task(up.server.stop(0.2))
        with pytest.raises(ServerError, match="shutting down"):
            async for _ in stream:
                pass
        await asyncio.wait_for(stopping, 5)


async def test_a_server_that_is_stopped_twice_stops_once(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        await asyncio.gather(up.server.stop(0), up.server.stop(0))
        await asyncio.wait_for(up.server.wait(), 1)
