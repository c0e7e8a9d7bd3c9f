"""Who may connect: a door listens, and everyone who comes says which rank of which mesh it is.

A hello carries the mesh's epoch and secret, inside of TLS where that is configured. One that does not match is refused
and logged; strangers and silent connections cost the mesh no time, because all of them are heard at once.
"""

from __future__ import annotations

import contextlib
import hmac
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from shardray.parallel.credentials import Credentials
from shardray.parallel.errors import CollectiveTimeout, MeshError, PeerLost
from shardray.parallel.frames import LENGTH
from shardray.parallel.link import Link
from shardray.parallel.place import Member
from shardray.parallel.strangers import Strangers
from shardray.parallel.tls import TlsError, TlsFiles
from shardray.parallel.tls_socket import TlsSocket

_MAX_HELLO_BYTES = 4096
_HELLO_TIMEOUT_S = 5.0
_MAX_GUESTS = 512  # that have yet to say who they are; the one that has been silent for longest makes room
_WELCOME = b""


class _Hello(msgspec.Struct, frozen=True):
    epoch: str
    secret: str
    rank: int


class _RefusedError(Exception):
    """Why a connection is not one of ours, and what about this one."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(why + detail)
        self.why, self.detail = why, detail


@dataclass
class _Guest:
    """A connection whose hello has not come in full."""

    sock: socket.socket | TlsSocket
    address: str
    since: float
    received: bytearray = field(default_factory=bytearray)

    def read(self) -> bytes | None:
        """What has arrived of the hello; its payload once complete. Never reads past it."""
        while len(self.received) < (num_bytes := self._num_bytes()):
            try:
                data = self.sock.recv(num_bytes - len(self.received))
            except BlockingIOError:
                return None
            except OSError as error:
                raise _RefusedError(error.strerror or str(error)) from error
            if not data:
                raise _RefusedError("closed without a hello")
            self.received += data
        return bytes(self.received[LENGTH.size :])

    def _num_bytes(self) -> int:
        """Of the whole frame; of its length field and one more, so never complete, while that is not known."""
        if len(self.received) < LENGTH.size:
            return LENGTH.size + 1
        (length,) = LENGTH.unpack_from(self.received)
        if not 0 < length <= _MAX_HELLO_BYTES:
            raise _RefusedError("no hello", f" but a frame of {length} bytes")
        return LENGTH.size + int(length)


class Door:
    """Listens on one address and lets in who knows the credentials. ``what`` names its connections in the log."""

    def __init__(self, bind_host: str, credentials: Credentials, what: str) -> None:
        self._tls = None if credentials.tls is None else credentials.tls.server_context()
        self._socket = listen_on(bind_host)
        self._socket.setblocking(False)
        self._credentials = credentials
        self._strangers = Strangers(what)
        self._is_open = True
        self.port: int = self._socket.getsockname()[1]

    def enter(self, missing: dict[int, Member], send_timeout_s: float, deadline: float) -> Iterator[tuple[int, Link]]:
        """Each rank of ``missing`` as it comes, with a link to it; all else is refused. Ends when nobody is missing,
        at the deadline, or when the door is closed. Who may come again is put back before the next one is asked for.
        """
        with selectors.DefaultSelector() as selector:
            try:
                with contextlib.suppress(OSError, ValueError):  # closed before anybody came: the loop does not begin
                    selector.register(self._socket, selectors.EVENT_READ)
                while missing and self._is_open and time.monotonic() < deadline:
                    for guest in self._hear(selector, deadline):
                        if (rank := self._rank_of(selector, guest, missing)) is not None:
                            link = Link(guest.sock, missing[rank], send_timeout_s)
                            if _welcomed(link):
                                del missing[rank]
                                yield rank, link
            finally:
                for guest in _guests(selector):
                    guest.sock.close()
                self._strangers.close()

    def close(self) -> None:
        """Stop listening. Thread-safe; wakes ``enter``."""
        self._is_open = False
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed before
        self._socket.close()

    def _hear(self, selector: selectors.BaseSelector, deadline: float) -> list[_Guest]:
        """Those who have something to say; newcomers are let into the hall meanwhile, the silent are shown out."""
        now = time.monotonic()
        for guest in _guests(selector):
            if now - guest.since > _HELLO_TIMEOUT_S:
                self._turn_away(selector, guest, f"no hello within {_HELLO_TIMEOUT_S:g} s")
        ready = [key.data for key, _ in selector.select(timeout=max(0.0, min(deadline - now, _HELLO_TIMEOUT_S / 4)))]
        if None in ready and self._is_open:
            self._admit(selector)
        return [guest for guest in ready if guest is not None]

    def _admit(self, selector: selectors.BaseSelector) -> None:
        try:
            sock, address = self._socket.accept()
        except OSError:
            return  # it has gone again, or the door was closed
        sock.setblocking(False)
        if len(guests := _guests(selector)) >= _MAX_GUESTS:
            longest = min(guests, key=lambda guest: guest.since)
            self._turn_away(selector, longest, "too many connections without a hello")
        stream = sock if self._tls is None else TlsSocket(sock, self._tls, is_server=True)
        guest = _Guest(stream, f"{address[0]}:{address[1]}", time.monotonic())
        selector.register(sock, selectors.EVENT_READ, guest)

    def _rank_of(self, selector: selectors.BaseSelector, guest: _Guest, missing: dict[int, Member]) -> int | None:
        """Which rank the guest is, once its hello is complete and right."""
        if guest.sock.fileno() < 0:
            return None  # made room for another one
        try:
            if (frame := guest.read()) is None:
                return None
            rank = self._check(frame, missing)
        except _RefusedError as error:
            self._turn_away(selector, guest, error.why, error.detail)
            return None
        selector.unregister(guest.sock)
        return rank

    def _check(self, frame: bytes, missing: dict[int, Member]) -> int:
        try:
            hello = msgspec.json.decode(frame, type=_Hello)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise _RefusedError("no hello", f": {error}") from error
        known = self._credentials
        if not hmac.compare_digest(hello.secret.encode(), known.secret.encode()) or hello.epoch != known.epoch:
            raise _RefusedError("wrong epoch or secret")
        if hello.rank not in missing:
            raise _RefusedError(f"rank {hello.rank} is not awaited")
        return hello.rank

    def _turn_away(self, selector: selectors.BaseSelector, guest: _Guest, why: str, detail: str = "") -> None:
        selector.unregister(guest.sock)
        self._strangers.refuse(guest.address, why, detail)
        guest.sock.close()


class LinkListener:
    """The leader's side while a mesh forms."""

    def __init__(self, bind_host: str, credentials: Credentials) -> None:
        self._door = Door(bind_host, credentials, "control")
        self.port = self._door.port

    def accept(self, members: Sequence[Member], accept_timeout_s: float, send_timeout_s: float) -> dict[int, Link]:
        """A link to each of ``members``, by rank. Raises CollectiveTimeout naming those that did not come in time."""
        missing = {member.rank: member for member in members}
        links: dict[int, Link] = {}
        try:
            for rank, link in self._door.enter(missing, send_timeout_s, time.monotonic() + accept_timeout_s):
                links[rank] = link
            if missing:
                raise CollectiveTimeout("forming the control links", accept_timeout_s, list(missing.values()))
        except MeshError:
            for link in links.values():
                link.close()
            raise
        return links

    def close(self) -> None:
        self._door.close()


def listen_on(bind_host: str) -> socket.socket:
    """A listener on a free port of an IPv4 or IPv6 address."""
    family = socket.AF_INET6 if ":" in bind_host else socket.AF_INET
    return socket.create_server((bind_host, 0), family=family)


def hello(credentials: Credentials, rank: int) -> bytes:
    """What whoever connects to a door says first; an empty frame comes back."""
    return msgspec.json.encode(_Hello(credentials.epoch, credentials.secret, rank))


def connect(
    address: tuple[str, int],
    credentials: Credentials,
    rank: int,
    leader: Member,
    form_timeout_s: float,
    timeout_s: float,
    what: str = "control link",
) -> Link:
    """A rank's connection to a door of its leader. Raises PeerLost when nobody listens there or it is refused."""
    where = f"{what} to {address[0]}:{address[1]}"
    try:
        sock = socket.create_connection(address, timeout=form_timeout_s)
    except OSError as error:
        raise PeerLost(where, str(error), [leader]) from error
    try:
        link = Link(_secured(sock, credentials.tls), leader, timeout_s)
        link.send(hello(credentials, rank))
        link.recv(form_timeout_s)
    except (MeshError, TlsError):
        sock.close()
        raise
    return link


def _secured(sock: socket.socket, tls: TlsFiles | None) -> socket.socket | TlsSocket:
    return sock if tls is None else TlsSocket(sock, tls.client_context(), is_server=False)


def _welcomed(link: Link) -> bool:
    """False if the peer has gone again."""
    try:
        link.send(_WELCOME)
    except MeshError:
        link.close()
        return False
    return True


def _guests(selector: selectors.BaseSelector) -> list[_Guest]:
    return [key.data for key in selector.get_map().values() if key.data is not None]
