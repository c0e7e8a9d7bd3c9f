"""Who may call the port for gateways: everyone on this machine; from elsewhere, whom the public port lets in."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import grpc.aio
import pytest
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from shardray.runtime.cli.app import run
from shardray.runtime.config import GatewaySettings, GrpcAuthSettings, GrpcSettings, GrpcTlsSettings
from shardray.runtime.model.tokenizer import Tokenizer
from tests.certificates import make_tls
from tests.serving import serving

TOKEN, OF_OPS = "token-of-ci-00001", "token-of-ops-0001"


def secured(folder: Path) -> GrpcSettings:
    """TLS and tokens at the public port."""
    files, tokens = make_tls(folder, "127.0.0.1"), folder / "tokens"
    tokens.write_text(f"ci inference {TOKEN}\nops control {OF_OPS}\n")
    for secret in (tokens, Path(files.key)):
        secret.chmod(0o600)
    tls, auth = GrpcTlsSettings(cert=files.cert, key=files.key), GrpcAuthSettings(tokens=str(tokens))
    return GrpcSettings(listen="127.0.0.1:0", tls=tls, auth=auth)


REQUESTS = {"GetServerInfo": vllm_engine_pb2.GetServerInfoRequest(), "FlushCache": common_pb2.FlushCacheRequest()}


async def code_of(channel: grpc.aio.Channel, token: str | None = None, method: str = "GetServerInfo") -> str:
    """How a call ends."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    call = getattr(vllm_engine_pb2_grpc.VllmEngineStub(channel), method)
    try:
        await call(REQUESTS[method], metadata=metadata, timeout=10)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.asyncio
@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0"])
async def test_on_this_machine_or_where_it_is_said_so_everyone_is_let_in(
    tokenizer: Tokenizer, tmp_path: Path, listen: str
) -> None:
    gateway = GatewaySettings(listen=listen, allow_unauthenticated=listen.startswith("0"))
    async with serving(tokenizer, num_replicas=0, grpc=secured(tmp_path), gateway=gateway) as up:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{up.server.gateway_port}") as channel:
            assert [await code_of(channel, method=method) for method in REQUESTS] == ["OK", "OK"]


@pytest.mark.asyncio
async def test_elsewhere_certificates_and_tokens_are_those_of_the_public_port(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    gateway = GatewaySettings(listen="0.0.0.0:0")
    async with serving(tokenizer, num_replicas=0, grpc=secured(tmp_path), gateway=gateway) as up:
        address = f"127.0.0.1:{up.server.gateway_port}"
        async with grpc.aio.insecure_channel(address) as channel:
            assert await code_of(channel) == "UNAVAILABLE"
        trusted = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
        async with grpc.aio.secure_channel(address, trusted) as channel:
            codes = [await code_of(channel, token) for token in (None, "wrong", OF_OPS, TOKEN)]
            assert codes == ["UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED", "OK"]
            codes = [await code_of(channel, token, "FlushCache") for token in (TOKEN, OF_OPS)]
            assert codes == ["PERMISSION_DENIED", "OK"], "what all callers share is the operator's to drop"


def test_without_the_extra_the_command_says_which_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "shardray.runtime.observe.extras.find_spec", lambda name: None if name == "smg_grpc_proto" else find(name)
    )
    assert run(["serve", "--set", "model.source=/nowhere", "--set", "gateway.listen=127.0.0.1:50061"]) == 2
    assert capsys.readouterr().err == (
        "error: gateway.listen: 127.0.0.1:50061 needs the package smg-grpc-proto, which is not installed; "
        "pip install 'shardray[gateway]', or set it to null\n"
    )
