"""Memory that one process fills and others map: whole or not at all, whoever dies, and nothing is left of it."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import resource
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardray.parallel import segment as segments
from shardray.parallel.kept import is_there_already, keep, keeping_in
from shardray.parallel.segment import open_segment

SIZE = 8 << 20  # elements of one tensor; int16, so 16 MiB
CAPACITY = 64 << 20
Body = Callable[[Connection, str], None]


class Processes:
    """Each runs a function with its end of a pipe and the name of a segment."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        self.name = f"shardray-test-{secrets.token_hex(8)}"
        self.started: list[Any] = []

    def start(self, body: Body) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_alone, args=(body, theirs, self.name), daemon=True)
        process.start()
        theirs.close()
        self.started.append(process)
        return ours

    def kill(self, index: int) -> None:
        self.started[index].kill()
        self.started[index].join()


def _alone(body: Body, pipe: Connection, name: str) -> None:
    faulthandler.disable()  # one of them is to end by a signal
    torch.set_num_threads(1)  # the threads of torch do not come along into a fork
    body(pipe, name)


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    for process in found.started:
        process.kill()
        process.join()
    assert not list(segments._find(found.name)), "nothing is left once all have ended"


def count_up(tensor: Tensor) -> None:
    tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape).to(torch.int16))


def take(name: str, fill: Callable[[Tensor], None] = count_up) -> tuple[list[Tensor], bool]:
    """Two tensors of the segment, and whether they were there."""
    with open_segment(name, CAPACITY) as segment, keeping_in(segment):
        return [keep((SIZE,), torch.int16, fill), keep((3, 5), torch.int16, fill)], is_there_already()


def hold(pipe: Connection, name: str) -> None:
    """Take the tensors, tell, and hold them until told to go."""
    tensors, were_there = take(name)
    pipe.send((were_there, [int(tensor.sum()) for tensor in tensors], _mapped(name)))
    pipe.recv()


def hang_half_way(pipe: Connection, name: str) -> None:
    def fill(tensor: Tensor) -> None:
        tensor.fill_(7)
        pipe.send("half")
        time.sleep(600)

    take(name, fill)


def _mapped(name: str) -> dict[str, int]:
    """KiB of the segment that this process maps, by kind."""
    found, is_own = {"Pss": 0, "Shared_Clean": 0, "Shared_Dirty": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.split()[0]:
            is_own = f"memfd:{name}" in line
        elif is_own and key in found:
            found[key] += int(rest.split()[0])
    return found


def expected_sums() -> list[int]:
    tensors = [torch.empty(SIZE, dtype=torch.int16), torch.empty(3, 5, dtype=torch.int16)]
    for tensor in tensors:
        count_up(tensor.view(-1))
    return [int(tensor.sum()) for tensor in tensors]


def test_the_second_maps_what_the_first_filled_and_outlives_it(processes: Processes) -> None:
    first = processes.start(hold)
    assert first.recv()[:2] == (False, expected_sums())
    second = processes.start(hold)
    were_there, sums, mapped = second.recv()
    assert (were_there, sums) == (True, expected_sums())
    assert mapped["Shared_Clean"] + mapped["Shared_Dirty"] >= 2 * SIZE // 1024, "its pages are those of the first"
    assert mapped["Pss"] <= 2 * SIZE // 1024 * 0.6
    processes.kill(0)
    third = processes.start(hold)
    assert third.recv()[:2] == (True, expected_sums()), "found with the one that is left"
    second.send("go")
    third.send("go")


def test_of_two_at_once_one_fills_and_the_other_waits(processes: Processes) -> None:
    def slowly(pipe: Connection, name: str) -> None:
        def fill(tensor: Tensor) -> None:
            pipe.send("fills")
            time.sleep(0.3)
            count_up(tensor.view(-1))

        tensors, were_there = take(name, fill)
        pipe.send((were_there, [int(tensor.sum()) for tensor in tensors]))
        pipe.recv()

    told = []
    for pipe in [processes.start(slowly) for _ in range(4)]:
        told.append([])
        while not isinstance(message := pipe.recv(), tuple):
            told[-1].append(message)
        told[-1].append(message)
    fills = [messages for messages in told if "fills" in messages]
    assert fills == [["fills", "fills", (False, expected_sums())]]
    assert [messages for messages in told if messages not in fills] == [[(True, expected_sums())]] * 3


def test_what_a_killed_process_half_filled_is_never_used(processes: Processes) -> None:
    half = processes.start(hang_half_way)
    assert half.recv() == "half"
    waiting = processes.start(hold)
    assert not waiting.poll(0.5), "it waits for the one that fills"
    processes.kill(0)
    assert waiting.poll(10), "which has ended: the lock went with it"
    assert waiting.recv()[:2] == (False, expected_sums())
    waiting.send("go")


def test_a_process_that_fills_and_hangs_is_not_waited_for_long(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert processes.start(hang_half_way).recv() == "half"
    monkeypatch.setattr(segments, "_PATIENCE_S", 0.3)
    seen: list[int] = []
    with caplog.at_level(logging.INFO), open_segment(processes.name, CAPACITY, seen.append) as segment:
        assert segment is None
    assert max(seen) >= 2 * SIZE, "meanwhile it can be told how far the other is"
    assert "does not get on" in caplog.text


def test_loading_that_fails_leaves_nothing_to_others(processes: Processes) -> None:
    def fail(tensor: Tensor) -> None:
        raise ValueError(f"a broken file, {tensor.numel()} numbers")

    with pytest.raises(ValueError, match="a broken file"):
        take(processes.name, fail)
    assert processes.start(hold).recv()[:2] == (False, expected_sums())


@pytest.mark.parametrize("when", ["before", "between"])
def test_without_room_tensors_are_the_process_s_own(processes: Processes, when: str) -> None:
    def limited(pipe: Connection, name: str) -> None:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("shardray").addHandler(handler)
        logging.getLogger("shardray").setLevel(logging.INFO)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

        if when == "before":
            limit()
        with open_segment(name, CAPACITY) as segment, keeping_in(segment):
            small = keep((5,), torch.int16, count_up)
            limit()
            large = keep((SIZE,), torch.int16, count_up)
        pipe.send((small.tolist(), int(large.sum()), lines))
        pipe.recv()

    pipe = processes.start(limited)
    small, large, lines = pipe.recv()
    assert (small, large) == ([0, 1, 2, 3, 4], expected_sums()[0])
    assert len(lines) == 1
    assert "not shared" in lines[0]
    assert processes.start(hold).recv()[0] is False, "nobody is given what there was room for"


@pytest.mark.parametrize("number", [0, 1], ids=["who fills it", "who maps it"])
def test_a_stray_write_ends_the_process_that_writes_and_changes_nothing(processes: Processes, number: int) -> None:
    def scribble(pipe: Connection, name: str) -> None:
        tensors, _ = take(name)
        pipe.send("there")
        if pipe.recv() == "write":
            tensors[0].fill_(9)

    pipes = []
    for _ in range(2):
        pipes.append(processes.start(scribble))
        pipes[-1].recv()
    pipes[number].send("write")
    processes.started[number].join(10)
    assert processes.started[number].exitcode == -signal.SIGSEGV
    assert processes.start(hold).recv()[:2] == (True, expected_sums())


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_memory_of_another_user_is_not_mapped(processes: Processes) -> None:
    def as_nobody(pipe: Connection, name: str) -> None:
        os.setuid(65534)
        hold(pipe, name)

    assert processes.start(as_nobody).recv()[0] is False
    assert processes.start(hold).recv()[0] is False


def test_memory_goes_with_its_last_tensor(processes: Processes) -> None:
    tensors, _ = take(processes.name)
    assert list(segments._find(processes.name))
    tensors.pop(0)
    assert list(segments._find(processes.name)), "another one is left"
    tensors.clear()
    assert not list(segments._find(processes.name))


def test_tensors_without_elements_take_no_memory(processes: Processes) -> None:
    for _ in range(2):
        with open_segment(processes.name, CAPACITY) as segment, keeping_in(segment):
            empty, full = keep((0, 4), torch.bfloat16, count_up), keep((4,), torch.bfloat16, count_up)
        assert empty.shape == (0, 4)
        assert full.tolist() == [0.0, 1.0, 2.0, 3.0]
