"""A ``shardray serve`` of a tiny model, and clients that stream from it all the while."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from shardray.runtime.client import Client, ServerError
from shardray.v1 import control_pb2
from tests.command import Command
from tests.stub_tokenizer import EOS_ID, write_tokenizer
from tests.tiny_models import save_llama

PROMPT_IDS = (5, 17, 42, 99)
NUM_TOKENS = 400
NUM_CLIENTS = 2


def save_tiny(folder: Path) -> Path:
    return write_tokenizer(save_llama(folder, vocab_size=EOS_ID + 1, eos_token_id=EOS_ID), keep_config=True)


@contextlib.contextmanager
def tiny_fleet(model_folder: Path, *more_settings: str) -> Iterator[Command]:
    """Afterwards, that it ends cleanly: by SIGTERM, unless it has ended by itself."""
    settings = [
        f"model.source={model_folder}",
        "model.max_model_len=512",
        "model.dtype=float32",
        "engine.kv_memory_bytes=8MiB",
        "engine.max_num_seqs=4",
        "grpc.listen=127.0.0.1:0",
        *more_settings,
    ]
    command = Command(("serve", "--json", *(word for setting in settings for word in ("--set", setting))))
    yield command
    command.process.terminate()
    _, stderr = command.process.communicate(timeout=60)
    assert (command.process.returncode, stderr) == (0, "")
    assert command.left_behind() == []


class SteadyStreams:
    """Clients that ask the same over and over, so that some stream is in flight at any moment."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._enough = threading.Event()
        self.answers: list[list[int]] = []
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(NUM_CLIENTS)]

    def __enter__(self) -> SteadyStreams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(timeout=120)

    def assert_undisturbed(self, expected: list[int]) -> None:
        assert self.errors == []
        assert len(self.answers) >= NUM_CLIENTS
        assert all(answer == expected for answer in self.answers)

    def _ask(self) -> None:
        try:
            with Client(self._address, timeout_s=120) as client:
                while not self._enough.is_set():
                    answer = client.generate(PROMPT_IDS, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
                    self.answers.append(answer.token_ids)
        except BaseException as error:
            self.errors.append(error)


class Snapshots:
    """What the fleet says of itself, every change of it."""

    def __init__(self, address: str) -> None:
        self._client = Client(address, timeout_s=120)
        self._thread = threading.Thread(target=self._watch)
        self.fleets: list[control_pb2.Fleet] = []

    def __enter__(self) -> Snapshots:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()
        self._thread.join(timeout=20)

    def _watch(self) -> None:
        with contextlib.suppress(ServerError):  # the connection was closed
            for fleet in self._client.watch_fleet(min_interval_s=0.02):
                self.fleets.append(fleet)


def operate(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    """One of the commands that change a fleet, to its end."""
    command = [sys.executable, "-m", "shardray", *words, "--server", address, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
