"""``shardray scale`` on a served model while clients stream: every token is that of the undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardray.runtime.client import Client
from tests.command import Command
from tests.stub_tokenizer import EOS_ID, write_tokenizer
from tests.tiny_models import Reference, save_llama

pytestmark = pytest.mark.integration

PROMPT_IDS = (5, 17, 42, 99)
NUM_TOKENS = 400
NUM_CLIENTS = 2


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("tiny"), vocab_size=EOS_ID + 1, eos_token_id=EOS_ID)
    return write_tokenizer(folder, keep_config=True)


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[int]:
    return Reference(model_folder).greedy(PROMPT_IDS, NUM_TOKENS)


@pytest.fixture
def address(model_folder: Path) -> Iterator[str]:
    settings = [
        f"model.source={model_folder}",
        "model.max_model_len=512",
        "model.dtype=float32",
        "engine.kv_memory_bytes=8MiB",
        "engine.max_num_seqs=4",
        "grpc.listen=127.0.0.1:0",
    ]
    command = Command(("serve", "--json", *(word for setting in settings for word in ("--set", setting))))
    yield command.until_event("serving")["address"]
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

    def _ask(self) -> None:
        try:
            with Client(self._address, timeout_s=120) as client:
                while not self._enough.is_set():
                    answer = client.generate(PROMPT_IDS, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
                    self.answers.append(answer.token_ids)
        except BaseException as error:
            self.errors.append(error)


def scale(address: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardray", "scale", *options, "--server", address, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def shape(address: str) -> list[tuple[int, int]]:
    """(stages, tensor ranks) of each replica."""
    with Client(address) as client:
        replicas = client.fleet().replicas
    return [
        (len({shard.stage for shard in replica.shards}), len({shard.tp_rank for shard in replica.shards}))
        for replica in replicas
    ]


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        pytest.param(("-tp", "2"), [(1, 2)], id="tensor"),
        pytest.param(("--replicas", "2"), [(1, 1), (1, 1)], id="replicas"),
        pytest.param(
            ("-pp", "2", "--replicas", "2"), [(2, 1), (2, 1)], id="stages and replicas", marks=pytest.mark.slow
        ),
    ],
)
def test_streams_go_on_through_a_scale_there_and_back(
    address: str, expected: list[int], options: tuple[str, ...], shapes: list[tuple[int, int]]
) -> None:
    with SteadyStreams(address) as streams:
        time.sleep(0.5)
        for wanted, after in ((options, shapes), (("-tp", "1", "-pp", "1", "--replicas", "1"), [(1, 1)])):
            done = scale(address, *wanted)
            assert (done.returncode, done.stderr) == (0, "")
            fractions = [json.loads(line)["fraction"] for line in done.stdout.splitlines()]
            assert fractions[-1] == 1.0
            assert fractions == sorted(fractions)
            assert shape(address) == after
    assert streams.errors == []
    assert len(streams.answers) >= NUM_CLIENTS
    assert all(answer == expected for answer in streams.answers)


def test_a_shape_without_room_is_refused_with_numbers_and_touches_nothing(address: str, expected: list[int]) -> None:
    done = scale(address, "--replicas", "1000")
    assert (done.returncode, done.stdout.count("1.0")) == (1, 0)
    assert "1000" in done.stderr
    assert done.stderr.count("\n") == 1
    assert shape(address) == [(1, 1)]
    with Client(address) as client:
        answer = client.generate(PROMPT_IDS, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    assert answer.token_ids == expected
