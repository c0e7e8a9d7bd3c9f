"""The demo model behind a real server, for all outside clients."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardray.runtime.client import Client
from shardray.runtime.config import GrpcAuthSettings, GrpcSettings, GrpcTlsSettings
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer
from tests.certificates import make_tls
from tests.real_replica import RealReplica
from tests.serving import SHARD, Serving, in_thread, serving
from tests.stub_replica import SECRET
from tests.stub_tokenizer import write_tokenizer

TOKEN = "token-of-ci-00001"
_HERE = "127.0.0.1"


@dataclass
class Guarded:
    """A server with TLS and tokens, and reflection for those who show one."""

    address: str
    ca: str


@contextlib.asynccontextmanager
async def _serving(tokenizer: Tokenizer, replica: RealReplica) -> AsyncIterator[Serving]:
    async with serving(tokenizer, num_replicas=0, grpc=GrpcSettings(listen=f"{_HERE}:0", kserve=True)) as up:
        await up.driver.attach(0, replica.address, SECRET, [SHARD])
        yield up


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Serving]:
    """SmolLM2-135M-Instruct in float32; it calls itself ``stub``, as every fleet of these tests does."""
    folder = resolve_model("smollm2-135m")
    replica = RealReplica(folder, max_model_len=512)
    try:
        with in_thread(_serving(Tokenizer.load(folder), replica)) as up:
            yield up
    finally:
        replica.kill()


@pytest.fixture(scope="session")
def native(smollm2: Serving) -> Iterator[Client]:
    """Our own client of the same server."""
    with Client(smollm2.address, timeout_s=120) as client:
        yield client


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """With a stub engine."""
    folder = tmp_path_factory.mktemp("guarded")
    files = make_tls(folder, _HERE)
    (folder / "tokens").write_text(f"ci inference {TOKEN}")
    for secret in (Path(files.key), folder / "tokens"):
        secret.chmod(0o600)
    settings = GrpcSettings(
        listen=f"{_HERE}:0",
        tls=GrpcTlsSettings(cert=files.cert, key=files.key),
        auth=GrpcAuthSettings(tokens=str(folder / "tokens")),
        reflection=True,
        kserve=True,
    )
    with in_thread(serving(Tokenizer.load(write_tokenizer(folder / "model")), grpc=settings)) as up:
        yield Guarded(up.address, files.ca)
