"""Who may call what, over real gRPC: tokens, roles, each caller's own requests, and their limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from shardray.runtime.client import Access, AccessError, AsyncClient, Client, ServerError
from shardray.runtime.config import Config, GrpcAuthSettings, GrpcSettings, ModelSettings
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.observe.observation import Observation
from shardray.runtime.server import secret_files
from shardray.v1 import control_pb2, inference_pb2
from tests.server.test_server import services
from tests.serving import Serving, eventually, serving

pytestmark = pytest.mark.asyncio
TOKENS = {"ci": "token-of-ci-00001", "bob": "token-of-bob-0001", "ops": "token-of-ops-0001", "few": "token-of-few-0001"}
FILE = f"""
ci  inference          {TOKENS["ci"]}
bob inference          {TOKENS["bob"]}
ops control            {TOKENS["ops"]}
few inference          {TOKENS["few"]} max_requests=3 max_queued=1
"""


@contextlib.asynccontextmanager
async def guarded(
    tokenizer: Tokenizer, folder: Path, num_replicas: int = 1, reflection: bool | None = None, **options: Any
) -> AsyncIterator[Serving]:
    (folder / "tokens").write_text(FILE)
    (folder / "tokens").chmod(0o600)
    auth = GrpcAuthSettings(tokens=str(folder / "tokens"))
    settings = GrpcSettings(listen="127.0.0.1:0", auth=auth, reflection=reflection)
    access = Access(token=TOKENS["ci"])
    async with serving(tokenizer, grpc=settings, access=access, num_replicas=num_replicas, **options) as up:
        yield up


def client_of(up: Serving, name: str) -> AsyncClient:
    return AsyncClient(up.address, timeout_s=30, access=Access(token=TOKENS[name]))


async def code_of(up: Serving, method: str, *authorization: str) -> str:
    """How a call ends that carries these values of the metadata key."""
    async with grpc.aio.insecure_channel(up.address) as channel:
        metadata = tuple(("authorization", value) for value in authorization)
        try:
            await channel.unary_unary(method)(b"", metadata=metadata, timeout=5)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
    return "OK"


MODEL, FLEET = "/shardray.v1.InferenceService/GetModel", "/shardray.v1.ControlService/GetFleet"
HEALTH = "/grpc.health.v1.Health/Check"


async def test_roles_open_their_service_and_nothing_else(tokenizer: Tokenizer, tmp_path: Path) -> None:
    observation = Observation(Config(model=ModelSettings(source="stub")))
    async with guarded(tokenizer, tmp_path, observation=observation) as up:
        expected = {"ci": ("OK", "PERMISSION_DENIED"), "ops": ("PERMISSION_DENIED", "OK")}
        for name, codes in expected.items():
            bearer = f"Bearer {TOKENS[name]}"
            assert (await code_of(up, MODEL, bearer), await code_of(up, FLEET, bearer)) == codes
        for wrong in ((), ("",), ("Bearer ",), ("Bearer wrong",), (TOKENS["ci"],), (f"Basic {TOKENS['ci']}",)):
            assert await code_of(up, MODEL, *wrong) == "UNAUTHENTICATED"
            assert await code_of(up, FLEET, *wrong) == "UNAUTHENTICATED"
        assert await code_of(up, MODEL, f"Bearer {TOKENS['ci']}", f"Bearer {TOKENS['ci']}") == "UNAUTHENTICATED"
        assert await code_of(up, MODEL, f"bearer {TOKENS['ci']}") == "OK", "the scheme's case does not count"
        assert await code_of(up, HEALTH) == "OK"
        assert await code_of(up, "/shardray.v1.InferenceService/Nothing") == "UNAUTHENTICATED"
        assert await code_of(up, "/shardray.v1.InferenceService/Nothing", f"Bearer {TOKENS['ci']}") == "UNIMPLEMENTED"
    counted = {code: observation.calls["GetModel", code] for code in ("OK", "PERMISSION_DENIED", "UNAUTHENTICATED")}
    assert counted == {"OK": 2, "PERMISSION_DENIED": 1, "UNAUTHENTICATED": 7}


async def test_a_refusal_says_what_to_do_and_the_log_holds_no_token(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "a-token-that-nobody-has"
    async with guarded(tokenizer, tmp_path) as up:
        async with AsyncClient(up.address, access=Access()) as stranger:
            with pytest.raises(ServerError, match=r"a token is asked for.*SHARDRAY_TOKEN_FILE") as caught:
                await stranger.generate("abc")
            assert (caught.value.code, caught.value.reason) == ("UNAUTHENTICATED", "TOKEN_MISSING_OR_UNKNOWN")
        async with AsyncClient(up.address, access=Access(token=wrong)) as stranger:
            for _ in range(3):
                with pytest.raises(ServerError, match="the token is not known here"):
                    await stranger.model()
        with pytest.raises(
            ServerError, match=r"ci has the role inference, and shardray\.v1\.ControlService needs control"
        ):
            await up.client.fleet()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1, "at most one line a minute"
    assert "refused 1 calls, the last one from ipv4:127.0.0.1" in told[0]
    assert not any(token in caplog.text for token in (wrong, *TOKENS.values()))


async def test_reflection_is_there_only_when_asked_for_and_asks_for_a_token(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    async with guarded(tokenizer, tmp_path, num_replicas=0) as up:
        assert await code_of(up, method, f"Bearer {TOKENS['ci']}") == "UNIMPLEMENTED"
    async with guarded(tokenizer, tmp_path, num_replicas=0, reflection=True) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(up)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_caller_reaches_its_own_requests_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async with guarded(tokenizer, tmp_path, step_time_s=0.01) as up, client_of(up, "bob") as bob:
        mine = up.client.stream("abc", request_id="r1", max_tokens=200)
        await anext(mine)
        assert not await bob.abort("r1")
        resume = inference_pb2.GenerateRequest(request_id="r1", resume=inference_pb2.ResumePoint())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(bob._inference.Generate(resume)))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "request_id 'r1' is neither" in (caught.value.details() or "")
        his = bob.stream("abc", request_id="r1", max_tokens=3)
        assert {delta.request_id async for delta in his} == {"r1"}, "ids of others are in nobody's way"
        with pytest.raises(ServerError, match="request_id 'r1' is in flight") as duplicate:
            await up.client.generate("abc", request_id="r1", resumable_s=0)
        assert duplicate.value.code == "ALREADY_EXISTS"
        assert await up.client.abort("r1")
        await mine.aclose()


async def test_a_callers_limits_hold_for_it_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async with guarded(tokenizer, tmp_path, step_time_s=0.01) as up, client_of(up, "few") as few:
        streams = [few.stream("abc", max_tokens=300, ignore_eos=True) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(ServerError, match="few has 3 requests in flight, the most that its max_req") as caught:
            await few.generate("abc")
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "CALLER_LIMIT")
        assert caught.value.retry_after_s is not None
        assert (await up.client.generate("abc", max_tokens=3)).usage.num_output_tokens == 3
        await streams[0].aclose()
        await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == 2)
        assert (await few.generate("abc", max_tokens=3)).usage.num_output_tokens == 3
        for stream in streams[1:]:
            await stream.aclose()


async def test_a_callers_share_of_the_queue_is_bounded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async with guarded(tokenizer, tmp_path, max_num_seqs=1, step_time_s=0.01) as up, client_of(up, "few") as few:
        running = [asyncio.ensure_future(up.client.generate("abc", max_tokens=300, ignore_eos=True)) for _ in range(2)]
        await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == 2)
        waiting = asyncio.ensure_future(few.generate("abc", max_tokens=1))
        await eventually(lambda: up.driver.fleet.snapshot().num_queued_requests == 1)
        with pytest.raises(ServerError, match="few has 1 requests waiting, the most that its max_queued allows"):
            await few.generate("abc")
        for task in (*running, waiting):
            task.cancel()
        await asyncio.gather(*running, waiting, return_exceptions=True)


async def test_a_token_that_is_taken_out_of_the_file_ends_and_a_new_one_begins(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret_files, "_LOOK_EVERY_S", 0.05)
    async with guarded(tokenizer, tmp_path, step_time_s=0.01) as up:
        stream = up.client.stream("abc", max_tokens=100)
        await anext(stream)
        (tmp_path / "tokens").write_text("new inference token-of-new-0001")
        async with AsyncClient(up.address, access=Access(token="token-of-new-0001")) as new:
            async with asyncio.timeout(5):
                while not await _is_let_in(new):
                    await asyncio.sleep(0.05)
        assert not await _is_let_in(up.client)
        assert [delta async for delta in stream][-1].usage.num_output_tokens == 100, "what runs goes on"


async def _is_let_in(client: AsyncClient) -> bool:
    try:
        await client.model()
    except ServerError as error:
        return error.code != "UNAUTHENTICATED"
    return True


async def test_the_blocking_client_reads_its_token_from_a_file_with_every_call(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.write_text(TOKENS["ci"] + "\n")
    async with guarded(tokenizer, tmp_path) as up:
        monkeypatch.setenv("SHARDRAY_TOKEN_FILE", str(mine))

        def ask() -> None:
            with Client(up.address, timeout_s=10) as client:
                assert client.generate("abc", max_tokens=3).usage.num_output_tokens == 3
                mine.write_text(TOKENS["ops"])
                assert client.fleet().state == control_pb2.FLEET_STATE_READY
                mine.write_text("two words")
                with pytest.raises(AccessError, match="mine holds no token: give one line"):
                    client.model()

        await asyncio.to_thread(ask)


async def test_a_token_does_not_leave_the_machine_in_plain_text_unless_told_to() -> None:
    for away in ("192.0.2.1:1", "localhost.example:1", "127.0.0.1.example:1", "[2001:db8::1]:1", "127.0.0.1"):
        with pytest.raises(AccessError, match=r"would go to .* in plain text; use TLS"):
            AsyncClient(away, access=Access(token="x" * 16))
    for here in ("127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "localhost:1", "unix:/run/x", "ipv4:127.0.0.1:1"):
        await AsyncClient(here, access=Access(token="x" * 16)).close()
    for allowed in (Access(token="x" * 16, tls=True), Access(token="x" * 16, plaintext_token=True), Access()):
        await AsyncClient("192.0.2.1:1", access=allowed).close()
