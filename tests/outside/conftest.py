"""The demo model behind a real server, for all outside clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardray.runtime.client import Client
from shardray.runtime.config import GrpcSettings
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer
from tests.real_replica import RealReplica
from tests.serving import Serving, served_in_background


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Serving]:
    """SmolLM2-135M-Instruct in float32; it calls itself ``stub``, as every fleet of these tests does."""
    folder = resolve_model("smollm2-135m")
    replica = RealReplica(folder, max_model_len=512)
    try:
        settings = GrpcSettings(listen="127.0.0.1:0", kserve=True)
        with served_in_background(Tokenizer.load(folder), replica, num_replicas=0, grpc=settings) as up:
            yield up
    finally:
        replica.kill()


@pytest.fixture(scope="session")
def native(smollm2: Serving) -> Iterator[Client]:
    """Our own client of the same server."""
    with Client(smollm2.address, timeout_s=120) as client:
        yield client
