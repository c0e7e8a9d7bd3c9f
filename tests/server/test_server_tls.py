"""TLS at the public port: who gets in, what a wrong certificate is called, renewal under streams, the probe port."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
import socket
import ssl
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardray.runtime.client import Access, AccessError, AsyncClient, Client, ServerError
from shardray.runtime.config import GrpcAuthSettings, GrpcSettings, GrpcTlsSettings
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server import secret_files
from shardray.runtime.server.secret_files import SecretsError
from shardray.runtime.server.tls import ServerTls
from tests.certificates import make_tls
from tests.serving import Serving, serving

pytestmark = pytest.mark.asyncio
NAME = "127.0.0.1"
TOKEN = "token-of-ci-00001"


def settings(folder: Path, asks_clients: bool = False, **others: object) -> GrpcSettings:
    """A server with a certificate of an authority of its own, in ``folder``."""
    files = make_tls(folder, NAME)
    Path(files.key).chmod(0o600)
    tls = GrpcTlsSettings(cert=files.cert, key=files.key, client_ca=files.ca if asks_clients else None)
    return GrpcSettings(listen="127.0.0.1:0", tls=tls, **others)  # type: ignore[arg-type]


def trusting(folder: Path, shown: Path | None = None) -> Access:
    cert, key = (str(shown / "cert.pem"), str(shown / "key.pem")) if shown else (None, None)
    return Access(ca=str(folder / "ca.pem"), cert=cert, key=key)


def serial_number(up: Serving, folder: Path) -> str:
    """Of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    host, _, port = up.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        with context.wrap_socket(sock, server_hostname=NAME) as secured:
            return str((secured.getpeercert() or {})["serialNumber"])


async def why_not(up: Serving, access: Access) -> str:
    """What a client is told that cannot connect."""
    async with AsyncClient(up.address, timeout_s=5, access=access) as client:
        with pytest.raises(ServerError) as caught:
            await client.model()
        assert caught.value.code == "UNAVAILABLE"
        return str(caught.value)


async def test_both_clients_stream_over_tls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    access = trusting(tmp_path)
    async with serving(tokenizer, grpc=settings(tmp_path), access=access) as up:
        assert (await up.client.generate("abc", max_tokens=3)).text == "abc"

        def ask() -> str:
            with Client(up.address, timeout_s=10, access=access) as client:
                return client.generate("abc", max_tokens=3).text

        assert await asyncio.to_thread(ask) == "abc"


async def test_a_client_that_cannot_connect_is_told_why(tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_tls(tmp_path / "other")
    async with serving(tokenizer, grpc=settings(tmp_path), access=trusting(tmp_path)) as up:
        assert "does it ask for TLS (--tls, --ca)" in await why_not(up, Access())
        assert "not signed by an authority that is trusted here" in await why_not(up, trusting(tmp_path / "other"))
        assert "not signed by an authority" in await why_not(up, Access(tls=True)), "of the machine"
        async with AsyncClient(up.address, access=Access(tls=True)) as client:
            with pytest.raises(ServerError, match=r"was not ready within 0\.3 s; the certificate of .* is not signed"):
                await client.wait_ready(0.3)
    async with serving(tokenizer) as up:
        assert "does not speak TLS; leave out --tls and --ca" in await why_not(up, trusting(tmp_path))
    with pytest.raises(AccessError, match="absent cannot be read: No such file"):
        AsyncClient(access=Access(ca=str(tmp_path / "absent")))
    with pytest.raises(AccessError, match="belong together"):
        Access(cert="cert.pem")


async def test_a_certificate_for_another_name_is_refused_by_the_client(tokenizer: Tokenizer, tmp_path: Path) -> None:
    grpc_settings = settings(tmp_path)
    files = make_tls(tmp_path, "elsewhere.example")
    Path(files.key).chmod(0o600)
    async with serving(tokenizer, num_replicas=0, grpc=grpc_settings, access=trusting(tmp_path)) as up:
        assert "is for other names; connect to one of those" in await why_not(up, trusting(tmp_path))


async def test_with_a_client_ca_only_its_certificates_get_in(tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_tls(tmp_path / "other")
    mine = trusting(tmp_path, shown=tmp_path)
    async with serving(tokenizer, grpc=settings(tmp_path, asks_clients=True), access=mine) as up:
        assert (await up.client.generate("abc", max_tokens=3)).text == "abc"
        assert (await up.client.fleet()).replicas, "with certificates alone there are no roles"
        for stranger in (trusting(tmp_path), trusting(tmp_path, shown=tmp_path / "other")):
            assert "or for a certificate of the client (--cert, --key)?" in await why_not(up, stranger)


async def test_a_renewed_certificate_is_shown_to_new_connections_while_old_streams_go_on(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret_files, "_LOOK_EVERY_S", 0.05)
    caplog.set_level(logging.WARNING)
    async with serving(tokenizer, grpc=settings(tmp_path), access=trusting(tmp_path), step_time_s=0.02) as up:
        before = await asyncio.to_thread(serial_number, up, tmp_path)
        stream = up.client.stream("abc", max_tokens=100, ignore_eos=True)
        tokens = list((await anext(stream)).token_ids)
        (tmp_path / "cert.pem").write_text("half of a certific")
        async with asyncio.timeout(5):
            while "what was read before stays in use" not in caplog.text:
                await asyncio.sleep(0.05)
        assert await asyncio.to_thread(serial_number, up, tmp_path) == before
        files = make_tls(tmp_path / "new", NAME)  # another authority, too
        for name in ("ca.pem", "key.pem", "cert.pem"):
            shutil.copyfile(Path(files.ca).with_name(name), tmp_path / name)
        async with asyncio.timeout(5):
            while True:
                try:
                    assert await asyncio.to_thread(serial_number, up, tmp_path) != before
                    break
                except ssl.SSLCertVerificationError:
                    await asyncio.sleep(0.05)
        async with AsyncClient(up.address, access=trusting(tmp_path)) as new:
            assert (await new.generate("abc", max_tokens=3)).text == "abc"
        async for delta in stream:
            tokens += delta.token_ids
        assert tokens == tokenizer.encode("abc") * 33 + tokenizer.encode("a")


async def test_probes_need_neither_certificate_nor_token_and_reach_nothing_else(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(f"ci inference {TOKEN}")
    (tmp_path / "tokens").chmod(0o600)
    guarded = settings(
        tmp_path,
        asks_clients=True,
        auth=GrpcAuthSettings(tokens=str(tmp_path / "tokens")),
        probe_listen="127.0.0.1:0",
    )
    access = dataclasses.replace(trusting(tmp_path, shown=tmp_path), token=TOKEN)
    async with serving(tokenizer, grpc=guarded, access=access) as up:
        await up.client.wait_ready(10)
        assert (await up.client.generate("abc", max_tokens=3)).text == "abc"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{up.server.probe_port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "shardray.v1.InferenceService"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            for method in ("/shardray.v1.InferenceService/GetModel", "/shardray.v1.ControlService/GetFleet"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(method)(b"", metadata=(("authorization", f"Bearer {TOKEN}"),))
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("cert", r"grpc\.tls\.cert: /.*cert\.pem: pem lib; it has to be a certificate in PEM form"),
        ("key", r"grpc\.tls\.cert: /.*cert\.pem: key values mismatch; .*key\.pem its private key, not encrypted"),
        (
            "ca",
            r"grpc\.tls\.client_ca: /.*ca\.pem: no certificate or crl found; it has to be a certificate in PEM form",
        ),
    ],
)
async def test_files_that_cannot_be_used_are_named(broken: str, message: str, tmp_path: Path) -> None:
    tls = settings(tmp_path, asks_clients=True).tls
    assert tls is not None
    other = make_tls(tmp_path / "other", NAME)
    if broken == "key":
        shutil.copyfile(other.key, tmp_path / "key.pem")  # of another certificate
    else:
        (tmp_path / f"{broken}.pem").write_text("nothing")
    with pytest.raises(SecretsError, match=message):
        ServerTls(tls).start()
    (tmp_path / f"{broken}.pem").unlink()
    with pytest.raises(SecretsError, match=rf"{broken}\.pem cannot be read: No such file"):
        ServerTls(tls).start()


async def test_a_key_that_every_user_may_read_is_refused(tmp_path: Path) -> None:
    tls = settings(tmp_path).tls
    assert tls is not None
    Path(tls.key).chmod(0o644)
    with pytest.raises(SecretsError, match=r"grpc\.tls\.key: .* open to every user of this machine; chmod o-rw"):
        ServerTls(tls).start()
