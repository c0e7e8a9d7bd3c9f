"""A stub fleet with a metrics port, served in the loop of another thread for all tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from shardray.runtime.config import Config, MetricsSettings, ModelSettings
from shardray.runtime.observe.observation import Observation
from tests.serving import Serving, in_thread, serving

SECRET_PROMPT = (71, 72, 73, 74, 75, 76)


@dataclass
class Observed:
    """A served fleet, and the address of its metrics port."""

    up: Serving
    address: str
    loop: asyncio.AbstractEventLoop

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
        """The answer and its text."""
        connection = http.client.HTTPConnection(self.address, timeout=20)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer, text

    def run(self, coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)  # type: ignore[arg-type]

    def generate(self, **options: object) -> None:
        """One request of the stub engine, to its end."""
        self.run(self.up.client.generate(list(SECRET_PROMPT), **options))  # type: ignore[arg-type]


@pytest.fixture(scope="package")
def observed() -> Iterator[Observed]:
    with in_thread(_observed()) as found:
        yield found


@contextlib.asynccontextmanager
async def _observed() -> AsyncIterator[Observed]:
    config = Config(model=ModelSettings(source="stub"), metrics=MetricsSettings(listen="127.0.0.1:0"))
    observation = Observation(config)
    async with serving(None, num_replicas=2, observation=observation, step_time_s=0.004) as up:
        address = observation.start(up.driver.fleet)
        assert address is not None
        yield Observed(up, address, asyncio.get_running_loop())
        await observation.stop()
