"""One tokenizer and one smg for all tests of the gateway's port."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from shardray.runtime.model.tokenizer import Tokenizer
from tests.stub_tokenizer import write_tokenizer

_START_S = 60.0


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@dataclass(frozen=True)
class Smg:
    """The gateway as its package has it. It serves whatever is entered in the discovery file."""

    base_url: str
    discovery_file: str


@pytest.fixture(scope="session")
def smg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smg]:
    folder = tmp_path_factory.mktemp("smg")
    port, metrics_port, discovery_file = free_port(), free_port(), str(folder / "workers.json")
    command = [
        *(str(Path(sys.executable).with_name("smg")), "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--discovery-provider", "file", "--discovery-file", discovery_file),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait_until_live(f"http://127.0.0.1:{port}/liveness", process)
        yield Smg(f"http://127.0.0.1:{port}/v1", discovery_file)
    finally:
        process.kill()
        process.wait()


async def until_served(
    client: openai.AsyncOpenAI, model: str, ask: Callable[[], Awaitable[object]] | None = None
) -> None:
    """smg has heard of the model, and loaded its tokenizer: ``ask`` (a completion) has an answer."""
    ask = ask or (lambda: client.completions.create(model=model, prompt="a", max_tokens=1))
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            await ask()
            return
        except openai.APIStatusError as error:
            last = error
            await asyncio.sleep(0.05)
    pytest.fail(f"smg does not serve {model}: {last}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_live(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, "smg ended at once"
        assert time.monotonic() < deadline, f"smg does not answer at {url}"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
