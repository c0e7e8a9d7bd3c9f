"""How a client connects."""

from __future__ import annotations

DEFAULT_ADDRESS = "127.0.0.1:50051"
_LOOPBACK = ("127.", "localhost", "[::1]", "unix:")


def channel_options(address: str) -> list[tuple[str, int]]:
    """Pings keep a long silent wait alive; a proxy of the environment is not asked for this machine."""
    options = [
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A server that is started again is found within a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    if address.startswith(_LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))
    return options
