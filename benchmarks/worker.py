"""The harness's end of a contestant's process."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.kinds import Contestant
from benchmarks.protocol import Ran, Ready, Run, Setup, ran_from

REPOSITORY = Path(__file__).parent.parent
_CLOSE_TIMEOUT_S = 90.0


class ContestantError(RuntimeError):
    """A contestant that ended or did not answer in time; says the last line that it wrote."""


class Worker:
    """A contestant's process, loaded and warm for its first request. Made by ``start_worker``."""

    def __init__(self, process: subprocess.Popen[bytes], label: str, log: IO[bytes], timeout_s: float) -> None:
        self.spawned_s = time.perf_counter()
        self._process = process
        self._label = label
        self._log = log
        self._timeout_s = timeout_s

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, setup: Setup) -> Ready:
        return Ready(**self._ask(asdict(setup)))

    def run(self, run: Run) -> Ran:
        return ran_from(self._ask(asdict(run)))

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended early") from None
        answer: dict[str, Any] = json.loads(self._read_line())
        return answer

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + self._timeout_s
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise self._failure(f"did not answer within {self._timeout_s:g} s")
                chunk = os.read(self._process.stdout.fileno(), 1 << 20)
                if not chunk:
                    raise self._failure("ended early")
                line += chunk
        return bytes(line)

    def _failure(self, what: str) -> ContestantError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        log = os.path.relpath(self._log.name, REPOSITORY)
        return ContestantError(f"{self._label} {what}: {lines[-1] if lines else 'it wrote nothing'} ({log})")


@contextlib.contextmanager
def start_worker(contestant: Contestant, python: Path, log_path: Path, timeout_s: float) -> Iterator[Worker]:
    """Start a contestant's process, and end it with everything it started."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w+b") as log:
        process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.contestants.{contestant.kind.module}"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the harness, which then closes the pipe
        )
        try:
            yield Worker(process, contestant.label, log, timeout_s)
        except BaseException:
            process.terminate()  # it may be in the middle of a long run
            raise
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The end of its input is a contestant's sign to give everything back."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        process.stdout.close()
