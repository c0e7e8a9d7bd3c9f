"""What listening needs: an address, tried before gRPC does and logs lines of its own, and files for connections."""

from __future__ import annotations

import errno
import resource
import socket

from shardray.runtime.config.units import join_listen, parse_listen

_REASONS = {
    errno.EADDRINUSE: "another process listens there; stop it or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address; choose one of its own, or 0.0.0.0 for all",
    errno.EACCES: "ports below 1024 need more rights; choose a higher port",
}


class ListenError(OSError):
    """The address cannot be listened on; the message is one line with the fix."""

    def __init__(self, key: str, listen: str, reason: str) -> None:
        host, port = parse_listen(listen)
        example = join_listen(host, port + 1 if 1023 < port < 65535 else 50051)
        self.reason = f"cannot listen on {listen}: {reason}"
        super().__init__(f"{key}: {self.reason}, for example --set {key}={example}")


def check_listen(key: str, listen: str) -> None:
    """Raises ListenError. What is free now may still be taken a moment later."""
    host, port = parse_listen(listen)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: old connections do not count
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"{error.strerror}; choose another address")
        raise ListenError(key, listen, reason) from None


def raise_file_limit() -> None:
    """To the most that this process may have: a connection is an open file, and common soft limits are 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
