"""Restart, reload and drain of a served fleet while clients stream: every token is that of the undisturbed run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardray.runtime.client import Client, ServerError
from shardray.v1 import control_pb2
from tests.command import Command
from tests.integration.tiny_fleet import (
    NUM_TOKENS,
    PROMPT_IDS,
    Snapshots,
    SteadyStreams,
    operate,
    save_tiny,
    tiny_fleet,
)
from tests.tiny_models import Reference

pytestmark = pytest.mark.integration


@dataclass
class Fleet:
    """Two replicas."""

    command: Command
    address: str

    def now(self) -> control_pb2.Fleet:
        with Client(self.address) as client:
            return client.fleet()

    def pids(self) -> set[int]:
        return {shard.pid for replica in self.now().replicas for shard in replica.shards}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sharper_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, all logits doubled: other weights and log-probabilities, the same greedy tokens."""
    folder = tmp_path_factory.mktemp("sharper") / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[int]:
    return Reference(model_folder).greedy(PROMPT_IDS, NUM_TOKENS)


@pytest.fixture(scope="module")
def fleet(model_folder: Path) -> Iterator[Fleet]:
    with tiny_fleet(model_folder, "parallel.replicas=2") as command:
        yield Fleet(command, command.until_event("serving")["address"])


def operated(fleet: Fleet, expected: list[int], *words: str) -> list[control_pb2.Fleet]:
    """Run a command while clients stream; what the fleet said of itself meanwhile. No stream may notice."""
    with Snapshots(fleet.address) as snapshots, SteadyStreams(fleet.address) as streams:
        time.sleep(0.5)
        done = operate(fleet.address, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1]) == {"doing": "done", "fraction": 1.0}
    streams.assert_undisturbed(expected)
    return snapshots.fleets


def test_a_restart_replaces_every_process_one_replica_after_the_other(fleet: Fleet, expected: list[int]) -> None:
    before = fleet.pids()
    seen = operated(fleet, expected, "restart")
    assert not fleet.pids() & before
    assert {snapshot.state for snapshot in seen} == {control_pb2.FLEET_STATE_READY}
    steps = [snapshot.operation.progress.doing for snapshot in seen if snapshot.HasField("operation")]
    anew = [doing.partition(",")[0] for doing in steps if "anew" in doing]
    assert list(dict.fromkeys(anew)) == ["forming replica 0 anew", "forming replica 1 anew"]
    assert not fleet.now().HasField("operation")


def test_a_reload_serves_other_weights_behind_the_tokens_that_were_sent(
    fleet: Fleet, expected: list[int], sharper_folder: Path
) -> None:
    seen = operated(fleet, expected, "reload", str(sharper_folder))
    assert control_pb2.OPERATION_KIND_RELOAD in {snapshot.operation.kind for snapshot in seen}
    assert fleet.now().model_id == str(sharper_folder)
    with Client(fleet.address) as client:
        answer = client.generate(PROMPT_IDS, max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
    logits = Reference(sharper_folder).logits([*PROMPT_IDS, *answer.token_ids])[len(PROMPT_IDS) - 1 : -1]
    wanted = torch.log_softmax(logits, dim=-1).max(dim=-1).values.tolist()
    assert [position.chosen.logprob for position in answer.logprobs] == pytest.approx(wanted, abs=1e-3)


def test_a_drain_lets_streams_end_refuses_new_ones_and_ends_the_server(fleet: Fleet, expected: list[int]) -> None:
    """The last test here: the fleet is gone afterwards."""
    with Client(fleet.address, timeout_s=60) as client:
        stream = client.stream(PROMPT_IDS, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        token_ids = list(next(stream).token_ids)
        draining = client.drain(timeout_s=60)
        assert next(draining).doing == "waiting for 1 requests to end, 60 s at most"
        with pytest.raises(ServerError, match="draining"):
            client.generate(PROMPT_IDS, max_tokens=1)
        token_ids += [token_id for delta in stream for token_id in delta.token_ids]
        assert token_ids == expected
        assert [step.doing for step in draining][-2:] == ["stopping the server", "done"]
    assert fleet.command.process.wait(timeout=60) == 0
