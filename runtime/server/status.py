"""Errors of this program → gRPC status codes with machine-readable details (google.rpc.BadRequest, RetryInfo)."""

from __future__ import annotations

import logging

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from shardray.runtime.driver.errors import (
    BrokenRequestError,
    DeadlineExceededError,
    DuplicateRequestError,
    QueueFullError,
    StalledError,
    SuspendedError,
    TakenOverError,
    UnavailableError,
    UnknownRequestError,
)
from shardray.runtime.driver.operations import OperationConflictError, OperationError, OperationRefusedError
from shardray.runtime.engine.request import FieldError

_log = logging.getLogger(__name__)
# A status travels as a header, which both ends refuse beyond 8 KiB; each character may take twelve bytes there.
_MAX_MESSAGE_LEN = 300


def to_status(error: Exception) -> grpc.Status:
    """Code, one line and details for the client. What nobody foresaw is INTERNAL and goes to the log in full."""
    match error:
        case FieldError():
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
            details = error_details_pb2.BadRequest(field_violations=[violation])
            return _status(code_pb2.INVALID_ARGUMENT, str(error), details)
        case QueueFullError():
            return _status(code_pb2.RESOURCE_EXHAUSTED, str(error), _retry_info(error.retry_after_s))
        case UnavailableError():
            return _status(code_pb2.UNAVAILABLE, str(error), _retry_info(error.retry_after_s))
        case SuspendedError():  # without RetryInfo: what can be tried again is to resume it
            return _status(code_pb2.UNAVAILABLE, str(error))
        case UnknownRequestError():
            return _status(code_pb2.NOT_FOUND, str(error))
        case DuplicateRequestError():
            return _status(code_pb2.ALREADY_EXISTS, str(error))
        case DeadlineExceededError() | StalledError():
            return _status(code_pb2.DEADLINE_EXCEEDED, str(error))
        case BrokenRequestError():
            return _status(code_pb2.INTERNAL, str(error))
        case TakenOverError() | OperationConflictError():
            return _status(code_pb2.ABORTED, str(error))
        case OperationRefusedError():
            return _status(code_pb2.FAILED_PRECONDITION, str(error))
        case OperationError():  # it failed half-way, and says why itself
            return _status(code_pb2.INTERNAL, str(error))
    _log.error("unexpected error in a request", exc_info=error)
    return _status(code_pb2.INTERNAL, "internal error; the server's log has the details")


def _retry_info(delay_s: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(delay_s * 1000))
    return info


def _status(code: int, message: str, *details: Message) -> grpc.Status:
    status = status_pb2.Status(code=code, message=message[:_MAX_MESSAGE_LEN])
    for detail in details:
        status.details.add().Pack(detail)
    result: grpc.Status = rpc_status.to_status(status)
    return result
