"""How control links are made: the leader listens, every other rank connects and says which rank of which mesh it is.

A hello carries the mesh's epoch and secret. One that does not match is refused and logged; strangers and silent
connections cost the mesh no time, because all of them are heard at once.
"""

from __future__ import annotations

import hmac
import logging
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from shardray.parallel.errors import CollectiveTimeout, MeshError, PeerLost
from shardray.parallel.link import LENGTH, Link
from shardray.parallel.place import Member

_MAX_HELLO_BYTES = 4096
_HELLO_TIMEOUT_S = 5.0
_WELCOME = b""
_log = logging.getLogger(__name__)


class _Hello(msgspec.Struct, frozen=True):
    epoch: str
    secret: str
    rank: int


class _RefusedError(Exception):
    """Why a connection is not one of ours."""


@dataclass
class _Guest:
    """A connection whose hello has not come in full."""

    sock: socket.socket
    address: str
    since: float
    received: bytearray = field(default_factory=bytearray)

    def read(self) -> bytes | None:
        """What has arrived of the hello; its payload once complete. Never reads past it."""
        try:
            data = self.sock.recv(self._num_bytes() - len(self.received))
        except BlockingIOError:
            return None
        except OSError as error:
            raise _RefusedError(str(error)) from error
        if not data:
            raise _RefusedError("closed without a hello")
        self.received += data
        complete = len(self.received) == self._num_bytes()
        return bytes(self.received[LENGTH.size :]) if complete else None

    def turn_away(self, why: str) -> None:
        _log.warning("refused a control connection from %s: %s", self.address, why)
        self.sock.close()

    def _num_bytes(self) -> int:
        """Of the whole frame; of its length field and one more, so never complete, while that is not known."""
        if len(self.received) < LENGTH.size:
            return LENGTH.size + 1
        (length,) = LENGTH.unpack_from(self.received)
        if not 0 < length <= _MAX_HELLO_BYTES:
            raise _RefusedError(f"a frame of {length} bytes is no hello")
        return LENGTH.size + int(length)


class LinkListener:
    """The leader's side while a mesh forms."""

    def __init__(self, bind_host: str, epoch: str, secret: str) -> None:
        self._socket = socket.create_server((bind_host, 0))
        self._socket.setblocking(False)
        self._epoch = epoch
        self._secret = secret
        self.port: int = self._socket.getsockname()[1]

    def accept(self, members: Sequence[Member], accept_timeout_s: float, send_timeout_s: float) -> dict[int, Link]:
        """A link to each of ``members``, by rank. Raises CollectiveTimeout naming those that did not come in time."""
        missing = {member.rank: member for member in members}
        links: dict[int, Link] = {}
        deadline = time.monotonic() + accept_timeout_s
        with selectors.DefaultSelector() as selector:
            try:
                for guest, hello in self._hellos(selector, deadline):
                    if hello.rank not in missing:
                        guest.turn_away(f"rank {hello.rank} is not awaited")
                        continue
                    link = links[hello.rank] = Link(guest.sock, missing.pop(hello.rank), send_timeout_s)
                    link.send(_WELCOME)
                    if not missing:
                        return links
                raise CollectiveTimeout("forming the control links", accept_timeout_s, list(missing.values()))
            except MeshError:
                for link in links.values():
                    link.close()
                raise
            finally:
                for guest in _guests(selector):
                    guest.sock.close()

    def close(self) -> None:
        self._socket.close()

    def _hellos(self, selector: selectors.BaseSelector, deadline: float) -> Iterator[tuple[_Guest, _Hello]]:
        """Proper hellos as they come, until ``deadline``; everything else is turned away."""
        selector.register(self._socket, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            for guest in _guests(selector):
                if now - guest.since > _HELLO_TIMEOUT_S:
                    selector.unregister(guest.sock)
                    guest.turn_away(f"no hello within {_HELLO_TIMEOUT_S:g} s")
            for key, _ in selector.select(timeout=min(deadline - now, _HELLO_TIMEOUT_S / 4)):
                if key.data is None:
                    self._admit(selector)
                elif (hello := self._hear(selector, key.data)) is not None:
                    yield key.data, hello

    def _admit(self, selector: selectors.BaseSelector) -> None:
        try:
            sock, address = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has gone again
        sock.setblocking(False)
        guest = _Guest(sock, f"{address[0]}:{address[1]}", time.monotonic())
        selector.register(sock, selectors.EVENT_READ, guest)

    def _hear(self, selector: selectors.BaseSelector, guest: _Guest) -> _Hello | None:
        """The guest's hello, once it is complete and right."""
        try:
            if (frame := guest.read()) is None:
                return None
            hello = self._check(frame)
        except _RefusedError as error:
            selector.unregister(guest.sock)
            guest.turn_away(str(error))
            return None
        selector.unregister(guest.sock)
        return hello

    def _check(self, frame: bytes) -> _Hello:
        try:
            hello = msgspec.json.decode(frame, type=_Hello)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise _RefusedError(str(error)) from error
        if not hmac.compare_digest(hello.secret.encode(), self._secret.encode()) or hello.epoch != self._epoch:
            raise _RefusedError("wrong epoch or secret")
        return hello


def connect(
    address: tuple[str, int],
    epoch: str,
    secret: str,
    rank: int,
    leader: Member,
    form_timeout_s: float,
    timeout_s: float,
) -> Link:
    """A worker's link to its leader. Raises PeerLost when nobody listens there or the hello is refused."""
    try:
        sock = socket.create_connection(address, timeout=form_timeout_s)
    except OSError as error:
        raise PeerLost(f"control link to {address[0]}:{address[1]}", str(error), [leader]) from error
    link = Link(sock, leader, timeout_s)
    try:
        link.send(msgspec.json.encode(_Hello(epoch, secret, rank)))
        link.recv(form_timeout_s)
    except MeshError:
        link.close()
        raise
    return link


def _guests(selector: selectors.BaseSelector) -> list[_Guest]:
    return [key.data for key in selector.get_map().values() if key.data is not None]
