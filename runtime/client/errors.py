"""What a server answered instead of a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class ServerError(Exception):
    """A call that did not succeed; ``str`` is one line that says what to do.

    ``code`` is the gRPC code's name ("INVALID_ARGUMENT"), ``fields`` maps each bad field to what is wrong with it, and
    ``retry_after_s`` is how long the server asks to wait, if trying again can help.
    """

    def __init__(
        self, code: str, message: str, fields: dict[str, str] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.fields = fields or {}
        self.retry_after_s = retry_after_s


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
    fields, retry_after_s = _read_details(error)
    message = error.details() or code.name
    # Only a server that is there says when to try again.
    if code is grpc.StatusCode.UNAVAILABLE and retry_after_s is None:
        message = f"no answer from {address} ({message}); is `shardray serve` running there?"
    return ServerError(code.name, message, fields, retry_after_s)


def _read_details(error: grpc.RpcError) -> tuple[dict[str, str], float | None]:
    fields: dict[str, str] = {}
    retry_after_s = None
    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key != _DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad_request):
                fields |= {violation.field: violation.description for violation in bad_request.field_violations}
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return fields, retry_after_s
