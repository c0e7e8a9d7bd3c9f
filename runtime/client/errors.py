"""What a server answered instead of a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_TLS_FAILURES = {
    "certificate has expired": "the certificate of {address} has expired",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of {address} is not signed by an authority that is trusted here; "
    "give that one with --ca or SHARDRAY_CA",
    "Hostname Verification Check failed": "the certificate of {address} is for other names; connect to one of those",
    "WRONG_VERSION_NUMBER": "{address} does not speak TLS; leave out --tls and --ca",
    "Socket closed": "{address} closed the connection; does it ask for TLS (--tls, --ca) or for a certificate of "
    "the client (--cert, --key)?",
}


class ServerError(Exception):
    """A call that did not succeed; ``str`` is one line that says what to do.

    ``code`` is the gRPC code's name ("INVALID_ARGUMENT"), ``fields`` maps each bad field to what is wrong with it,
    ``retry_after_s`` is how long the server asks to wait, if trying again can help, and ``reason`` is the error's class
    ("BAD_FIELD"), which does not change from one version to the next; "" if it is not from the server itself.
    """

    def __init__(
        self,
        code: str,
        message: str,
        fields: dict[str, str] | None = None,
        retry_after_s: float | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.fields = fields or {}
        self.retry_after_s = retry_after_s
        self.reason = reason


@contextlib.contextmanager
def readable_errors(address: str) -> Iterator[None]:
    """Turn gRPC's errors into ServerError."""
    try:
        yield
    except grpc.RpcError as error:
        raise to_server_error(error, address) from None


def to_server_error(error: grpc.RpcError, address: str) -> ServerError:
    """Both kinds of error, of ``grpc`` and of ``grpc.aio``, have code, details and trailing metadata."""
    code: grpc.StatusCode = error.code()
    fields, retry_after_s, reason = _read_details(error)
    message = error.details() or code.name
    # Only a server that is there gives a reason.
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        message = _unreachable(address, message)
    elif code is grpc.StatusCode.UNAUTHENTICATED:
        message += "; commands read it from --token-file, SHARDRAY_TOKEN_FILE or SHARDRAY_TOKEN"
    return ServerError(code.name, message, fields, retry_after_s, reason)


def not_ready(address: str, timeout_s: float, last: ServerError | None) -> ServerError:
    """Of a client that waited; what it last heard tells a server that loads from one that cannot be reached."""
    why = f"; {last}" if last is not None and last.code == "UNAVAILABLE" else ""
    return ServerError("DEADLINE_EXCEEDED", f"{address} was not ready within {timeout_s:g} s{why}")


def _unreachable(address: str, details: str) -> str:
    """Why there is no connection, as far as gRPC's words for it tell."""
    for words, told in _TLS_FAILURES.items():
        if words in details:
            return told.format(address=address)
    return f"no answer from {address} ({details}); is `shardray serve` running there?"


def _read_details(error: grpc.RpcError) -> tuple[dict[str, str], float | None, str]:
    fields: dict[str, str] = {}
    retry_after_s, reason = None, ""
    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key != _DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(bad_request):
                fields |= {violation.field: violation.description for violation in bad_request.field_violations}
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(info):
                reason = info.reason
    return fields, retry_after_s, reason
