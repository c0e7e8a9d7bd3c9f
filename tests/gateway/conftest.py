"""One tokenizer and one smg for all tests of the gateway's port."""

from __future__ import annotations

import asyncio
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
from tests.ports import free_ports
from tests.stub_tokenizer import write_tokenizer

_START_S = 60.0
_TRIES = 3


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
    discovery_file = str(folder / "workers.json")
    for _ in range(_TRIES):  # another program may take a port before smg does, which then ends
        port, metrics_port = free_ports(2)
        process = _launch(folder, discovery_file, port, metrics_port)
        try:
            if _is_live(f"http://127.0.0.1:{port}/liveness", process):
                yield Smg(f"http://127.0.0.1:{port}/v1", discovery_file)
                return
        finally:
            process.kill()
            process.wait()
    pytest.fail(f"smg ended at once, {_TRIES} times: {(folder / 'log').read_text()}")


def _launch(folder: Path, discovery_file: str, port: int, metrics_port: int) -> subprocess.Popen[bytes]:
    command = [
        *(str(Path(sys.executable).with_name("smg")), "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--discovery-provider", "file", "--discovery-file", discovery_file),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
    ]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def _is_live(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether it answers; False if it has ended instead."""
    deadline = time.monotonic() + _START_S
    while process.poll() is None:
        assert time.monotonic() < deadline, f"smg does not answer at {url}"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    return False


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
