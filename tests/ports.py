"""Ports for programs that have to be told one."""

from __future__ import annotations

import contextlib
import socket


def free_ports(count: int) -> list[int]:
    """Unlike each other. Nothing keeps them: another program may have taken one by the time it is listened on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]
