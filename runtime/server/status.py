"""Errors of this program → gRPC status codes with machine-readable details (google.rpc).

Every status has an ErrorInfo of domain ``shardray``, whose reason names the class of the error and does not change.
"""

from __future__ import annotations

import logging

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from shardray.runtime.driver.errors import (
    BrokenRequestError,
    CallerLimitError,
    DeadlineExceededError,
    DuplicateRequestError,
    QueueFullError,
    RetryableError,
    StalledError,
    SuspendedError,
    TakenOverError,
    UnavailableError,
    UnknownModelError,
    UnknownRequestError,
)
from shardray.runtime.driver.operations import OperationConflictError, OperationError, OperationRefusedError
from shardray.runtime.engine.request import FieldError
from shardray.runtime.server.tokens import RoleMissingError, UnauthenticatedError

_log = logging.getLogger(__name__)
# A status travels as a header, which both ends refuse beyond 8 KiB; each character may take twelve bytes there.
_MAX_MESSAGE_LEN = 300
_DOMAIN = "shardray"
_REQUEST_TYPE = "shardray.v1.GenerateRequest"
# By class, the more special ones first: code and reason.
_STATUSES: dict[type[Exception], tuple[int, str]] = {
    FieldError: (code_pb2.INVALID_ARGUMENT, "BAD_FIELD"),
    UnauthenticatedError: (code_pb2.UNAUTHENTICATED, "TOKEN_MISSING_OR_UNKNOWN"),
    RoleMissingError: (code_pb2.PERMISSION_DENIED, "ROLE_MISSING"),
    CallerLimitError: (code_pb2.RESOURCE_EXHAUSTED, "CALLER_LIMIT"),
    QueueFullError: (code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    UnavailableError: (code_pb2.UNAVAILABLE, "NOT_READY"),
    SuspendedError: (code_pb2.UNAVAILABLE, "SUSPENDED"),
    UnknownRequestError: (code_pb2.NOT_FOUND, "UNKNOWN_REQUEST"),
    UnknownModelError: (code_pb2.NOT_FOUND, "UNKNOWN_MODEL"),
    DuplicateRequestError: (code_pb2.ALREADY_EXISTS, "REQUEST_ID_IN_USE"),
    DeadlineExceededError: (code_pb2.DEADLINE_EXCEEDED, "DEADLINE"),
    StalledError: (code_pb2.DEADLINE_EXCEEDED, "CLIENT_STALLED"),
    BrokenRequestError: (code_pb2.INTERNAL, "BREAKS_ITS_STEP"),
    TakenOverError: (code_pb2.ABORTED, "TAKEN_OVER"),
    OperationConflictError: (code_pb2.ABORTED, "OPERATION_UNDER_WAY"),
    OperationRefusedError: (code_pb2.FAILED_PRECONDITION, "OPERATION_REFUSED"),
    OperationError: (code_pb2.INTERNAL, "OPERATION_FAILED"),  # half-way; it says why itself
    NotImplementedError: (code_pb2.UNIMPLEMENTED, "UNIMPLEMENTED"),  # what generated code raises for a method left out
}


def to_status(error: Exception) -> grpc.Status:
    """Code, one line and details for the client. What nobody foresaw is INTERNAL and goes to the log in full."""
    for kind, (code, reason) in _STATUSES.items():
        if isinstance(error, kind):
            return _status(code, str(error), reason, *_details(error))
    _log.error("unexpected error in a request", exc_info=error)
    return _status(code_pb2.INTERNAL, "internal error; the server's log has the details", "UNFORESEEN")


def _details(error: Exception) -> list[Message]:
    """What a program can act on: the field to change, how long to wait, what was not found."""
    match error:
        case FieldError():
            description = error.message[:_MAX_MESSAGE_LEN]
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=description)
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case RetryableError():
            info = error_details_pb2.RetryInfo()
            info.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
            return [info]
        case UnknownRequestError() | DuplicateRequestError():
            name, what = error.request_id, str(error)
            return [error_details_pb2.ResourceInfo(resource_type=_REQUEST_TYPE, resource_name=name, description=what)]
        case UnknownModelError():
            name = error.model_id[:_MAX_MESSAGE_LEN]
            return [error_details_pb2.ResourceInfo(resource_type="model", resource_name=name, description=str(error))]
    return []


def _status(code: int, message: str, reason: str, *details: Message) -> grpc.Status:
    status = status_pb2.Status(code=code, message=message[:_MAX_MESSAGE_LEN])
    for detail in (*details, error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN)):
        status.details.add().Pack(detail)
    result: grpc.Status = rpc_status.to_status(status)
    return result
