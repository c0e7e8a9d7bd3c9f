"""``shardray`` commands as processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, ClassVar

import psutil
import pytest


@dataclass
class Command:
    """A ``shardray`` process whose descendants can be found, wherever they were reparented to."""

    arguments: tuple[str, ...]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: ClassVar[list[Command]] = []

    def __post_init__(self) -> None:
        self.started.append(self)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardray", *self.arguments],
            env={**os.environ, "SHARDRAY_TEST_MARK": self.mark},
            start_new_session=True,  # a terminal's foreground group: Ctrl-C reaches all of it
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # gRPC logs what strangers sent as it came
        )

    def until_event(self, name: str) -> dict[str, Any]:
        """Read JSON lines until the event comes."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        assert self.process.stderr is not None
        pytest.fail(f"ended before {name!r}: {self.process.stderr.read()}")

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def left_behind(self, timeout_s: float = 15.0) -> list[str]:
        """What still runs after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while (left := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(process.info["cmdline"]) for process in left]

    def kill(self) -> None:
        """All of it, where a test failed before it could end it: the next ones need the cores."""
        while left := self._marked():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                if process.environ().get("SHARDRAY_TEST_MARK") == self.mark and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found


def shardray(*arguments: str, stdin: str = "") -> str:
    """What the command prints; it must succeed."""
    command = [sys.executable, "-m", "shardray", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
