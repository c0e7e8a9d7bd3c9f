"""A process in which foreign text is read, as its owner sees it: started when needed, and again when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MAX_MEMORY_BYTES = 1 << 29
_MAX_PROCESSOR_S = 2.0
_MAIN = Path(__file__).with_name("sandbox_main.py")


class SandboxError(ValueError):
    """A text that is refused, or takes more than it is given."""


class Sandbox:
    """Answers one question at a time. Safe to use from several threads.

    ``worker``: a program with a function ``answer``, see ``sandbox_main.py``. ``subject``: what it reads, for messages.
    A question may use ``max_processor_s`` of processor time, and the process ``max_memory_bytes`` of address space.
    """

    def __init__(
        self, worker: Path, subject: str, max_memory_bytes: int = _MAX_MEMORY_BYTES,
        max_processor_s: float = _MAX_PROCESSOR_S,
    ) -> None:  # fmt: skip
        # -P: its folder is no place to import from.
        self._command = [sys.executable, "-P", str(_MAIN), str(worker), str(max_memory_bytes), str(max_processor_s)]
        self._subject = subject
        self._max_processor_s = max_processor_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_pid = 0

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def ask(self, question: Mapping[str, Any]) -> str:
        """The answer, to a question that is JSON. Raises SandboxError."""
        data = json.dumps(question).encode() + b"\n"
        with self._lock:
            process = self._running()
            try:
                answer = _exchange(process, data)
            except BaseException:  # Ctrl-C, say: the next question would get this one's answer
                process.kill()
                self._stop(process)
                raise
            if not answer:
                raise SandboxError(self._why_ended(process))
        told = json.loads(answer)
        if "error" in told:
            raise SandboxError(told["error"])
        return str(told["text"])

    def close(self) -> None:
        """It also ends with its owner, whose end of the pipe is closed then."""
        with self._lock:
            if self._process is not None:
                self._stop(self._process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and (self._owner_pid != os.getpid() or self._process.poll() is not None):
            self._process = None  # a fork must not share it; or it was killed meanwhile
        if self._process is None:
            # A group of its own: Ctrl-C in a terminal is not for it.
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, process_group=0)
            self._owner_pid = os.getpid()
        return self._process

    def _why_ended(self, process: subprocess.Popen[bytes]) -> str:
        code = self._stop(process)
        if code == -signal.SIGPROF:
            return f"{self._subject} took more than {self._max_processor_s:g} s of processor time"
        if code == -signal.SIGSEGV:
            return f"{self._subject} is nested too deeply"
        return f"the process that reads {self._subject} ended with code {code}"

    def _stop(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # part of a question that it will not read
            process.stdin.close()
        code = process.wait()
        process.stdout.close()
        self._process = None
        return code


def _exchange(process: subprocess.Popen[bytes], question: bytes) -> bytes:
    """Its answer; empty if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(question)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return b""
