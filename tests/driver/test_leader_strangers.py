"""Strangers at the leader's port while a driver streams from it."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import TlsFiles
from shardray.runtime.cluster.leader import LeaderServer
from shardray.runtime.driver.link import LinkError, ReplicaLink
from shardray.runtime.engine.request import EngineRequest, SamplingParams, TokenOutput
from tests.certificates import lets_in, make_tls, signed_by
from tests.serving import eventually
from tests.strangers import GREETINGS, besieged, call, until_shut_out
from tests.stub_engine import StubEngine

pytestmark = pytest.mark.asyncio
KNOWN = Credentials("e", "a secret of the mesh")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "tls"])
def known(request: pytest.FixtureRequest, tls: TlsFiles) -> Credentials:
    return KNOWN if request.param == "plain" else replace(KNOWN, tls=tls)


class Leader:
    """In this process, so that its log can be read."""

    def __init__(self, known: Credentials) -> None:
        self.engine, self.server = StubEngine(step_time_s=0.01), LeaderServer()
        self.port = self.server.start("127.0.0.1", self.engine, known)
        self.thread = threading.Thread(target=self.engine.run, args=(self.server.publish,))
        self.thread.start()

    def stop(self) -> None:
        self.engine.stop()
        self.thread.join()
        self.server.stop()


@pytest.fixture
def leader(known: Credentials) -> Iterator[Leader]:
    leader = Leader(known)
    yield leader
    leader.stop()


@asynccontextmanager
async def streaming(leader: Leader, known: Credentials, num_tokens: int) -> AsyncIterator[list[TokenOutput]]:
    """A driver that gets tokens all the while; all of them have come at the end."""
    outputs: list[TokenOutput] = []
    link = ReplicaLink(lambda new, rejections: outputs.extend(new))
    await link.connect(f"127.0.0.1:{leader.port}", known)
    link.submit(EngineRequest(request_id="r", prompt_ids=(1, 2), params=SamplingParams(max_tokens=num_tokens)))
    yield outputs
    await eventually(lambda: len(outputs) == num_tokens, timeout_s=30)
    await link.close()


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]


async def test_strangers_are_shut_out_and_told_of_while_a_driver_streams(
    leader: Leader, known: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with streaming(leader, known, 400):
        socks = [
            call(("127.0.0.1", leader.port), greeting, f"127.0.0.{20 + number}")
            for number, greeting in enumerate(GREETINGS.values())
        ]
        assert all([sock and await asyncio.to_thread(until_shut_out, sock, 20.0) for sock in socks])
        await eventually(lambda: len(refusals(caplog)) >= len(GREETINGS), timeout_s=5)
    told = refusals(caplog)
    assert len(told) == len(GREETINGS)
    for number in range(len(GREETINGS)):
        assert any(f"refused a driver connection from 127.0.0.{20 + number}:" in line for line in told), told
    assert KNOWN.secret not in caplog.text


async def test_a_flood_does_not_hold_up_the_driver_nor_fill_the_log(
    leader: Leader, known: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with besieged(lambda: {("127.0.0.1", leader.port)}) as calls:
        while calls.get(("127.0.0.1", leader.port), 0) < 200:
            await asyncio.sleep(0.05)
        began = time.monotonic()
        async with streaming(leader, known, 200):
            pass
        assert time.monotonic() - began < 20
    told = [line for line in refusals(caplog) if line.startswith("refused a driver connection from")]
    addresses_and_reasons = {re.sub(r":\d+: ((?:TLS: )?[^:;]*).*", r" \1", line) for line in told}
    assert len(told) == len(addresses_and_reasons), "one line a minute for each address and reason"
    assert len(told) <= 10 * 6


async def test_a_wrong_secret_is_told_of_with_the_address(
    leader: Leader, known: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    link = ReplicaLink(lambda new, rejections: None)
    with pytest.raises(LinkError, match="another secret"):
        await link.connect(f"127.0.0.1:{leader.port}", replace(known, secret="guess"))
    (line,) = refusals(caplog)
    assert line.startswith("refused a driver connection from 127.0.0.1:")
    assert line.endswith(": wrong epoch or secret")


async def test_only_certificates_of_the_clusters_authority_and_name_get_in(
    tls: TlsFiles, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    other = make_tls(tmp_path_factory.mktemp("other"))
    leader = Leader(replace(KNOWN, tls=tls))
    try:
        assert lets_in(leader.port, tls.ca, tls)
        assert not lets_in(leader.port, tls.ca, None)
        assert not lets_in(leader.port, tls.ca, other)
        for files in (None, other, signed_by(tls, other)):
            link = ReplicaLink(lambda new, rejections: None)
            with pytest.raises(LinkError):
                await link.connect(f"127.0.0.1:{leader.port}", replace(KNOWN, tls=files), timeout_s=5.0)
    finally:
        leader.stop()
    told = "\n".join(refusals(caplog))
    assert "peer did not return a certificate" in told
    assert "unable to get local issuer certificate" in told
    assert "PRIVATE" not in caplog.text
