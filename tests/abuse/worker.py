"""Clients in a process of their own, so that what they cost is not the server's: ``python -m tests.abuse.worker``.

An attack is a coroutine ``attack(address, told, **options)``: ``told`` has the lines that the parent says, None at the
end. What it returns is printed as one line of JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent.parent


class Worker:
    """``name`` is a module of this package with a coroutine ``attack``."""

    def __init__(self, name: str, address: str, **options: Any) -> None:
        command = [sys.executable, "-m", "tests.abuse.worker", name, address, json.dumps(options)]
        self.process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next thing it has to tell."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the clients ended with {self.process.wait()}"
        heard: dict[str, Any] = json.loads(line)
        return heard

    def result(self) -> dict[str, Any]:
        """Let it come to its end; what it found."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        result = self.hear()
        self.process.wait()
        return result

    def kill(self) -> None:
        """SIGKILL: no connection is closed by its owner."""
        self.process.kill()
        self.process.wait()


def tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


async def _attack(name: str, address: str, options: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[str | None] = asyncio.Queue()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(told.put_nowait, line.strip())
        loop.call_soon_threadsafe(told.put_nowait, None)

    threading.Thread(target=listen, daemon=True).start()
    tell(await importlib.import_module(f"tests.abuse.{name}").attack(address, told, **options))


if __name__ == "__main__":
    asyncio.run(_attack(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
