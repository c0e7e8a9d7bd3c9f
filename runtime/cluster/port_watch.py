"""Who is connected to the leader's port and has not shown the mesh's secret: told in the log.

gRPC refuses strangers without a word of who they were. The kernel's table of connections knows, also for a while after
gRPC has ended one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import struct
from collections.abc import Iterator
from urllib.parse import unquote

from shardray.parallel.strangers import Strangers

_log = logging.getLogger(__name__)
_INTERVAL_S = 1.0  # of grace for a driver between its connecting and its call
_NETLINK_SOCK_DIAG, _BY_FAMILY = 4, 20
_REQUEST_DUMP = 0x1 | 0x300
_ALL_BUT_LISTENING = 0xFFF & ~(1 << 10)  # states
_HEADER = struct.Struct("=IHHII")
_CONNECTION = struct.Struct("!B3x2xH16x16s")  # family, port and address of the far end
_ANSWER_BYTES = 1 << 16


class PortWatch:
    """Use it in one asyncio loop."""

    def __init__(self, port: int) -> None:
        self.strangers = Strangers("driver")
        self._port = port
        self._known: set[str] = set()  # addresses that need not be told of: drivers, and strangers told already
        self._seen: set[str] = set()

    def know(self, peer: str) -> str:
        """``peer`` (gRPC's name of it) has made a call; returns its host:port."""
        address = unquote(peer.partition(":")[2]).replace("[", "").replace("]", "")
        self._known.add(address)
        return address

    async def run(self) -> None:
        """Look until cancelled."""
        try:
            while True:
                await asyncio.sleep(_INTERVAL_S)
                self._look()
        except OSError as error:
            _log.warning("strangers at the leader's port are refused without a line here: no sock_diag(7): %s", error)
        finally:
            self.strangers.close()

    def _look(self) -> None:
        connected = set(peers_of(self._port))
        self._known &= connected
        for address in (connected & self._seen) - self._known:
            self.strangers.refuse(address, "no call with the mesh's secret")
            self._known.add(address)
        self._seen = connected


def peers_of(port: int) -> Iterator[str]:
    """The far ends, host:port, of the connections of a local port, those that have just ended among them.

    Asks for that port only (sock_diag(7)): /proc/net/tcp would list every connection of the machine.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            which = struct.pack("=BBxxI", family, socket.IPPROTO_TCP, _ALL_BUT_LISTENING) + struct.pack("!H46x", port)
            kernel.send(_HEADER.pack(_HEADER.size + len(which), _BY_FAMILY, _REQUEST_DUMP, 0, 0) + which)
            yield from _read_peers(kernel)


def _read_peers(kernel: socket.socket) -> Iterator[str]:
    while True:
        answer, at = kernel.recv(_ANSWER_BYTES), 0
        while at < len(answer):
            length, kind, *_ = _HEADER.unpack_from(answer, at)
            if kind != _BY_FAMILY:
                return  # the end, or a kernel without this family
            family, far_port, far_host = _CONNECTION.unpack_from(answer, at + _HEADER.size)
            yield f"{_host(far_host[: 4 if family == socket.AF_INET else 16])}:{far_port}"
            at += (length + 3) & ~3


def _host(packed: bytes) -> str:
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
