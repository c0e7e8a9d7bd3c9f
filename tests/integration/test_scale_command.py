"""``shardray scale`` on a served model while clients stream: every token is that of the undisturbed run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardray.runtime.client import Client
from tests.integration.tiny_fleet import NUM_TOKENS, PROMPT_IDS, SteadyStreams, operate, save_tiny, tiny_fleet
from tests.tiny_models import Reference

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[int]:
    return Reference(model_folder).greedy(PROMPT_IDS, NUM_TOKENS)


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    """Every test leaves it in its first shape."""
    with tiny_fleet(model_folder) as command:
        yield command.until_event("serving")["address"]


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
            done = operate(address, "scale", *wanted)
            assert (done.returncode, done.stderr) == (0, "")
            fractions = [json.loads(line)["fraction"] for line in done.stdout.splitlines()]
            assert fractions[-1] == 1.0
            assert fractions == sorted(fractions)
            assert shape(address) == after
    streams.assert_undisturbed(expected)


def test_a_shape_without_room_is_refused_with_numbers_and_touches_nothing(address: str, expected: list[int]) -> None:
    done = operate(address, "scale", "--replicas", "1000")
    assert (done.returncode, done.stdout.count("1.0")) == (1, 0)
    assert "1000" in done.stderr
    assert done.stderr.count("\n") == 1
    assert shape(address) == [(1, 1)]
    with Client(address) as client:
        answer = client.generate(PROMPT_IDS, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    assert answer.token_ids == expected
