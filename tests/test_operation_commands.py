"""scale, reload, restart, drain and status as an operator meets them: real processes against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from shardray.runtime.cli.app import run
from shardray.runtime.cli.fleet_words import describe_failure
from shardray.runtime.cluster.reports import FailureKind, RankFailure
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.operations import OperationKind, OperationProgress, OperationStatus, ShapeChange
from shardray.v1 import control_pb2
from tests.serving import Serving, eventually, serving
from tests.stub_operator import StubOperator


@dataclass
class Fleet:
    """A served fleet in the loop of another thread."""

    up: Serving
    operator: StubOperator
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return self.up.address

    def call(self, function: object, *arguments: object) -> None:
        self.loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    started: list[Fleet] = []
    is_up, may_end = threading.Event(), threading.Event()

    async def serve() -> None:
        operators: list[StubOperator] = []

        def make(driver: Driver) -> StubOperator:
            operators.append(StubOperator(driver))
            return operators[0]

        async with serving(None, operator=make) as up:
            started.append(Fleet(up, operators[0], asyncio.get_running_loop()))
            is_up.set()
            await asyncio.to_thread(may_end.wait)
        operators[0].kill_added()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_up.wait(20)
    yield started[0]
    started[0].call(started[0].operator.may_go_on.set)
    may_end.set()
    thread.join()


def shardray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_scale_prints_a_line_for_each_step(fleet: Fleet) -> None:
    done = shardray("scale", "-tp", "2", "-pp", "3", "--replicas", "2", "--server", fleet.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "  0%  from 1 to 2 replicas",
        "100%  replica 1 serves",
        "100%  done",
    ]
    assert fleet.operator.asked == [ShapeChange(tensor_parallel_size=2, pipeline_parallel_size=3, replicas=2)]


def test_scale_takes_the_long_names_and_unlike_shares(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--tensor-parallel-size=3", "--pipeline-parallel-size", "2"]
    shares = ["--tensor-split", "2,1,1", "--stage-layers", "10,12"]
    assert run(["scale", *counts, *shares, "--server", fleet.address]) == 0
    capsys.readouterr()
    [change] = fleet.operator.asked
    assert change == ShapeChange(3, 2, None, tensor_split=(2.0, 1.0, 1.0), stage_layers=(10, 12))


def test_json_is_one_object_a_line(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reload", "org/name", "--json", "--server", fleet.address]) == 0
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert steps == [{"doing": "loading org/name", "fraction": 0.0}, {"doing": "done", "fraction": 1.0}]


def test_a_terminal_shows_a_bar_and_keeps_the_last_step(fleet: Fleet) -> None:
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "shardray", "restart", "--server", fleet.address]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, text=True, timeout=60, check=False)
    os.close(side)
    with contextlib.closing(os.fdopen(terminal, "rb", buffering=0)) as reader:
        screen = reader.read(65536).decode()
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "━" in screen
    assert "%" in screen


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["scale", "--replicas", "9"], 1, "error: 9 replicas need 9 hosts, but there are 4"),
        (["scale"], 2, "error: replicas: nothing to change"),
        (["scale", "-tp", "0"], 2, "error: tensor_parallel_size: 0 is outside [1, 1024]"),
        (["scale", "-pp", "-2"], 2, "error: pipeline_parallel_size: -2 is not accepted"),
        (["scale", "-tp", "2", "--tensor-split", "1,1,1"], 2, "error: tensor_split: has 3 entries, give 2"),
        (["scale", "--stage-layers", "10,x"], 2, "error: Invalid value for --stage-layers: '10,x' is not a list"),
        (["drain", "--timeout", "-1"], 2, "error: timeout_s: -1 is outside [0, 86400]"),
        (["reload", ""], 2, "error: source: is empty"),
    ],
)
def test_a_refusal_is_one_line_and_an_exit_code(
    fleet: Fleet, arguments: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--server", fleet.address]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(expected)
    assert captured.err.count("\n") == 1


def test_a_failure_half_way_exits_with_1_and_its_reason(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.operator.fails_with = "host 10.0.0.1 died; the fleet is as it was"
    assert run(["restart", "--json", "--server", fleet.address]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fraction"] == 0.0
    assert captured.err == "error: host 10.0.0.1 died; the fleet is as it was\n"


def test_a_second_operation_is_refused_and_ctrl_c_leaves_the_first_running(fleet: Fleet) -> None:
    fleet.call(fleet.operator.may_go_on.clear)
    command = [sys.executable, "-m", "shardray", "scale", "--replicas", "2", "--server", fleet.address]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "  0%  from 1 to 2 replicas\n"
    second = shardray("restart", "--server", fleet.address)
    assert (second.returncode, second.stderr) == (1, "error: another operation is under way; wait for its end\n")
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=20)
    assert (first.returncode, "goes on" in stderr) == (130, True)
    fleet.call(fleet.operator.may_go_on.set)
    asyncio.run(eventually(lambda: len(fleet.up.driver.fleet.ready_replicas()) == 2))


def test_drain_ends_with_the_last_request(fleet: Fleet) -> None:
    done = shardray("drain", "--timeout", "5", "--server", fleet.address)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "100%  done")
    assert fleet.operator.asked == [5.0]


def test_status_shows_recoveries_the_last_failure_and_the_spares(fleet: Fleet) -> None:
    place = {"rank": 1, "stage": 1, "tp_rank": 0, "host": "10.0.0.2", "pid": 77}
    failure = RankFailure(**place, kind=FailureKind.DIED, step=12, cause="killed")
    state = fleet.up.driver.fleet
    fleet.call(state.set_recovering, 0, "loading weights", 0.5)
    fleet.call(state.set_failure, 0, failure)
    fleet.call(state.set_spares, 1, 2)
    done = shardray("status", "--server", fleet.address)
    assert "stub: recovering, 0 requests in flight, 0 queued, 1 of 2 spares ready" in done.stdout
    assert "replica 0: recovering – loading weights 50%" in done.stdout
    assert "stage 1 tensor rank 0 (host 10.0.0.2 pid 77) died at step 12: killed" in done.stdout
    fleet.call(state.set_ready, 0, [])
    told = json.loads(shardray("status", "--json", "--server", fleet.address).stdout)
    [replica] = told["replicas"]
    assert (replica["num_recoveries"], replica["last_failure"]["pid"], told["num_wanted_spares"]) == (1, 77, 2)
    assert "1 recovery; last failure 20" in shardray("status", "--server", fleet.address).stdout


def test_status_shows_the_operation_that_is_under_way(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    progress = OperationProgress("forming 1 more: needs 2 GPU bundles", 0.8)
    fleet.call(fleet.up.driver.fleet.set_operation, OperationStatus(OperationKind.SCALE, progress))
    assert run(["status", "--server", fleet.address]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^scale since \d\d:\d\d:\d\d: forming 1 more: needs 2 GPU bundles 80%$", text, re.MULTILINE)
    assert run(["status", "--json", "--server", fleet.address]) == 0
    operation = json.loads(capsys.readouterr().out)["operation"]
    assert (operation["kind"], operation["progress"]["fraction"]) == ("scale", 0.8)


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (control_pb2.Failure(cause="no link"), "no link"),
        (control_pb2.Failure(kind="hung", collective="all_reduce", cause="late"), "hung in all_reduce: late"),
        (control_pb2.Failure(kind="hung", collective="send", cause="waited in send"), "hung: waited in send"),
        (
            control_pb2.Failure(stage=0, tp_rank=2, host="h", pid=5, kind="raised", step=0, cause="boom"),
            "stage 0 tensor rank 2 (host h pid 5) raised at step 0: boom",
        ),
    ],
)
def test_a_failure_is_told_in_one_line(failure: control_pb2.Failure, text: str) -> None:
    assert describe_failure(failure) == text
