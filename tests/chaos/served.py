"""A ``shardray serve`` of its own for a chaos run: its settings, its processes, its words."""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from collections.abc import Iterable
from typing import IO

import psutil

from tests.command import Command

_STOP_TIMEOUT_S = 60.0


class Served:
    """Serves from its making to ``stop``."""

    def __init__(self, settings: Iterable[str]) -> None:
        words = [word for setting in settings for word in ("--set", setting)]
        self._command = Command(("serve", "--json", *words))
        self.stderr: list[str] = []
        self.address: str = self._command.until_event("serving")["address"]
        for pipe, lines in (
            (self._command.process.stderr, self.stderr),
            (self._command.process.stdout, deque(maxlen=1)),
        ):
            threading.Thread(target=_drain, args=(pipe, lines), daemon=True).start()

    def host_pids(self) -> list[int]:
        """Every host's process, whatever it is doing; those that ended are not among them."""
        return [process.pid for process in psutil.process_iter() if _is_host_of(process, self._command.mark)]

    def stop(self) -> list[str]:
        """SIGTERM; what is wrong afterwards."""
        self._command.process.terminate()
        try:
            code = self._command.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._command.process.kill()
            code = None
        wrong = [] if code == 0 else [f"serve ended with {code} after SIGTERM"]
        return wrong + [f"left behind: {line[:80]}" for line in self._command.left_behind()]

    def complaints(self) -> list[str]:
        """Lines of the log that no fault excuses."""
        return [line for line in self.stderr if "Traceback" in line or "never retrieved" in line]


def _drain(pipe: IO[str] | None, lines: list[str] | deque[str]) -> None:
    """Keep a pipe from filling up, which would block who writes to it."""
    assert pipe is not None
    for line in pipe:
        lines.append(line.rstrip())


def _is_host_of(process: psutil.Process, mark: str) -> bool:
    try:
        is_host = process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::Host")
        return is_host and process.environ().get("SHARDRAY_TEST_MARK") == mark and process.status() != "zombie"
    except psutil.Error:
        return False
