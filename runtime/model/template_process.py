"""The process that renders chat templates, as its owner sees it: started when it is needed, and again when it ended."""

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

MAX_MEMORY_BYTES = 1 << 29
MAX_PROCESSOR_S = 2.0
MAX_RENDERED_CHARS = 8_000_000  # beyond any context window
_PROGRAM = Path(__file__).with_name("template_worker.py")


class TemplateError(ValueError):
    """A template that is malformed, fails, or takes more than it is given."""


class TemplateProcess:
    """Renders one template at a time. Safe to use from several threads."""

    def __init__(
        self,
        max_memory_bytes: int = MAX_MEMORY_BYTES,
        max_processor_s: float = MAX_PROCESSOR_S,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> None:
        self._limits = (max_memory_bytes, max_processor_s, max_chars)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_pid = 0

    def compile(self, source: str) -> None:
        """Raises TemplateError."""
        self._ask({"source": source, "variables": None})

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError."""
        return self._ask({"source": source, "variables": variables})

    def close(self) -> None:
        """It also ends with its owner, whose end of the pipe is closed then."""
        with self._lock:
            if self._process is not None:
                self._stop(self._process)

    def _ask(self, question: Mapping[str, Any]) -> str:
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
                raise TemplateError(self._why_ended(process))
        told = json.loads(answer)
        if "error" in told:
            raise TemplateError(told["error"])
        return str(told["text"])

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and (self._owner_pid != os.getpid() or self._process.poll() is not None):
            self._process = None  # a fork must not share it; or it was killed meanwhile
        if self._process is None:
            # -P: its folder is no place to import from. A group of its own: Ctrl-C in a terminal is not for it.
            command = [sys.executable, "-P", str(_PROGRAM), *map(str, self._limits)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
            self._owner_pid = os.getpid()
        return self._process

    def _why_ended(self, process: subprocess.Popen[bytes]) -> str:
        code = self._stop(process)
        if code == -signal.SIGPROF:
            return f"the model's chat template took more than {self._limits[1]:g} s of processor time"
        return f"the process that renders the model's chat template ended with code {code}"

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


SHARED = TemplateProcess()
