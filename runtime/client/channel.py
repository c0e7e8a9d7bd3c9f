"""How a client connects, and how it shows who it is."""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import grpc.experimental

DEFAULT_ADDRESS = "127.0.0.1:50051"
_Metadata = tuple[tuple[str, str], ...]
# Whoever reads a stream takes its messages from the network, not from a thread that has: 0.8 of the time for each.
_BLOCKING_OPTIONS = ((grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),)


class AccessError(ValueError):
    """What a client was given to show cannot be used; the message is one line with the fix."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Certificates and token of a client. Files are read when the client is made; a token's with every call."""

    tls: bool = False  # with the authorities that this machine trusts; implied by the next three
    ca: str | None = None  # PEM file of the authority that signed the server's certificate
    cert: str | None = None  # PEM file of the client's own certificate, where the server asks for one
    key: str | None = None  # PEM file of its private key
    token: str | None = None
    token_file: str | None = None  # instead of ``token``
    plaintext_token: bool = False  # whether the token may go to another machine without TLS

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise AccessError("a client's certificate and its private key belong together; give both or none")

    @classmethod
    def from_environment(cls) -> Access:
        """Of SHARDRAY_TLS, _CA, _CERT, _KEY, _TOKEN, _TOKEN_FILE and _PLAINTEXT_TOKEN; unset or empty: not given."""

        def given(name: str) -> str | None:
            return os.environ.get(f"SHARDRAY_{name}") or None

        return cls(
            tls=given("TLS") not in (None, "0"),
            ca=given("CA"),
            cert=given("CERT"),
            key=given("KEY"),
            token=given("TOKEN"),
            token_file=given("TOKEN_FILE"),
            plaintext_token=given("PLAINTEXT_TOKEN") not in (None, "0"),
        )

    @property
    def uses_tls(self) -> bool:
        return self.tls or self.ca is not None or self.cert is not None

    def check(self, address: str) -> None:
        """Raises AccessError if the token would cross a network in plain text."""
        has_token = self.token is not None or self.token_file is not None
        if has_token and not (self.uses_tls or self.plaintext_token or _is_this_machine(address)):
            fix = "use TLS (--tls, --ca FILE), or allow it (--plaintext-token)"
            raise AccessError(f"the token would go to {address} in plain text; {fix}")

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises AccessError."""
        ca, key, cert = (path and _read(path) for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca or None, key or None, cert or None)

    def metadata(self) -> _Metadata:
        """Of one call. Raises AccessError."""
        if self.token_file is not None:
            token = _read(self.token_file).decode("utf-8", errors="replace").strip()
        elif self.token is not None:
            token = self.token.strip()
        else:
            return ()
        if not (token.isascii() and token.isprintable() and token and " " not in token):
            where = self.token_file or "SHARDRAY_TOKEN"
            raise AccessError(f"{where} holds no token: give one line of printable ASCII characters, without blanks")
        return (("authorization", f"Bearer {token}"),)


def open_channel(address: str, access: Access | None) -> grpc.Channel:
    """None takes what the environment says. Raises AccessError."""
    return _open(address, access, grpc, _BLOCKING_OPTIONS)  # type: ignore[no-any-return]


def open_aio_channel(address: str, access: Access | None) -> grpc.aio.Channel:
    """None takes what the environment says. Raises AccessError."""
    return _open(address, access, grpc.aio, ())  # type: ignore[no-any-return]


def channel_options(address: str) -> list[tuple[str, int]]:
    """Pings keep a long silent wait alive; a proxy of the environment is not asked for this machine."""
    options = [
        ("grpc.max_receive_message_length", -1),  # the server bounds what it sends
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A server that is started again is found within a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    if _is_this_machine(address):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def _is_this_machine(address: str) -> bool:
    """Whether what is sent to ``address`` stays here; a name but localhost may be anywhere, 127.example.org too."""
    host = address.removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _TokenChannel:
    """A channel whose calls carry the token. Interceptors of grpc.aio would handle every message."""

    def __init__(self, channel: Any, access: Access) -> None:
        self._channel = channel
        self._access = access

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        return functools.partial(self._method, found) if name in ("unary_unary", "unary_stream") else found

    def _method(self, make: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        method = make(*args, **options)
        return lambda request, **call_options: method(request, metadata=self._access.metadata(), **call_options)


def _open(address: str, access: Access | None, library: Any, more: Sequence[tuple[str, int]]) -> Any:
    access = Access.from_environment() if access is None else access
    access.check(address)
    options = [*channel_options(address), *more]
    if access.uses_tls:
        channel = library.secure_channel(address, access.credentials(), options=options)
    else:
        channel = library.insecure_channel(address, options=options)
    return _TokenChannel(channel, access) if access.metadata() else channel


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}") from None
