"""Strangers at the ports of real processes: what they send, and which ports there are."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil

Address = tuple[str, int]
_OWN_SOURCES = [f"127.0.0.{number}" for number in range(2, 12)]
_MAX_HELD = 500  # below what one process may have open


def _framed(payload: bytes) -> bytes:
    return struct.pack("!I", len(payload)) + payload


GREETINGS = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 20,
    "http": b"GET / HTTP/1.1\r\nHost: shardray\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "client hello": bytes.fromhex("16030100050100000103030000") + b"\0" * 40,
    "half a hello": b"\0\0\0\x40{",
    "old epoch": _framed(json.dumps({"epoch": "old", "secret": "guess", "rank": 1}).encode()),
    "pickle": _framed(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
}


def listeners_of(pids: Sequence[int]) -> set[Address]:
    """What the processes listen on."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port))
    return found


def call(
    address: Address, greeting: bytes, source: str = _OWN_SOURCES[0], timeout_s: float = 1.0
) -> socket.socket | None:
    try:
        sock = socket.create_connection(address, timeout=timeout_s, source_address=(source, 0))
    except OSError:
        return None  # it does not listen any more
    with contextlib.suppress(OSError):
        sock.sendall(greeting)
    return sock


@contextmanager
def besieged(doors: Callable[[], set[Address]], num_silent: int = 200) -> Iterator[dict[Address, int]]:
    """Strangers at every door that ``doors`` finds, over and over: ``num_silent`` that say nothing, and all others.

    Yields how often each door was called.
    """
    calls: dict[Address, int] = {}
    held: deque[socket.socket] = deque()
    stop = threading.Event()

    def run() -> None:
        kinds = itertools.cycle(GREETINGS.values())
        sources = itertools.cycle(_OWN_SOURCES)
        while not stop.wait(0.02):
            for door in doors():
                num_calls = num_silent if door not in calls else 4
                for number in range(num_calls):
                    sock = call(door, b"" if num_calls == num_silent and number else next(kinds), next(sources))
                    held.extend([sock] if sock is not None else [])
                    calls[door] = calls.get(door, 0) + (sock is not None)
            while len(held) > _MAX_HELD:
                held.popleft().close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield calls
    finally:
        stop.set()
        thread.join()
        for sock in held:
            sock.close()


def until_shut_out(sock: socket.socket, timeout_s: float) -> bool:
    """Whether the far end closes the connection in time."""
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            if not sock.recv(4096):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return False
