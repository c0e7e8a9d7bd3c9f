"""What surrounds every call. Errors become statuses here; a check of credentials belongs before it in the chain."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shardray.runtime.driver.errors import StalledError
from shardray.runtime.engine.request import FieldError
from shardray.runtime.server.handlers import OUR_SERVICES, Handler, rewrapped
from shardray.runtime.server.stall import StallGuard
from shardray.runtime.server.status import to_status
from shardray.runtime.server.wire import request_type, text_that_is_no_utf8

_ABORT_S = 0.1
_Context = grpc.aio.ServicerContext[Any, Any]


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose handler raised with the status that ``to_status`` gives the error.

    A client that keeps its connection but takes no message of a stream for ``stall_s`` seconds is given up.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(OUR_SERVICES):
            return handler
        assert handler.request_deserializer is not None  # the generated code has one for each method
        parse = functools.partial(_parsed, handler.request_deserializer, handler_call_details.method)
        if handler.request_streaming:
            parse_all = functools.partial(_all_parsed, parse)
            return rewrapped(handler, lambda behavior: _guard_stream(behavior, parse_all, self._stall_s), parses=True)
        if handler.response_streaming:
            return rewrapped(handler, lambda behavior: _guard_stream(behavior, parse, self._stall_s), parses=True)
        return rewrapped(handler, lambda behavior: _guard_unary(behavior, parse), parses=True)


def _guard_unary(behavior: Any, parse: Callable[[bytes], Any]) -> Any:
    async def guarded(data: bytes, context: _Context) -> Any:
        try:
            return await behavior(parse(data), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            return await _abort(context, error)

    return guarded


def _guard_stream(behavior: Any, parse: Callable[[Any], Any], stall_s: float) -> Any:
    async def guarded(data: Any, context: _Context) -> None:
        try:
            with _client_may_be_gone(), StallGuard(stall_s) as guard:
                async with contextlib.aclosing(behavior(parse(data), context)) as responses:
                    async for response in responses:
                        guard.writing_since_s = time.monotonic()
                        # Returns once the client has room for it. Not ``yield``: then gRPC would wait for ever.
                        await context.write(response)
                        guard.writing_since_s = None
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return guarded


def _parsed(parse: Callable[[bytes], Any], method: str, data: bytes) -> Any:
    """gRPC itself would log a traceback for every broken message, and call it UNKNOWN."""
    try:
        return parse(data)
    except DecodeError:
        if (field := text_that_is_no_utf8(data, request_type(method))) is not None:
            raise FieldError(field, "is not UTF-8") from None
        raise FieldError("request", "its bytes are not a message of this method") from None


async def _all_parsed(parse: Callable[[bytes], Any], messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in messages:
        yield parse(data)


async def _abort(context: _Context, error: Exception) -> None:
    status = to_status(error)
    # The status of a stalled client stands behind the messages that it does not take; nobody waits for that.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ABORT_S if isinstance(error, StalledError) else None):
            with _client_may_be_gone():
                await context.abort(status.code, status.details, status.trailing_metadata)


@contextlib.contextmanager
def _client_may_be_gone() -> Iterator[None]:
    """What cannot be sent has lost its client; gRPC is about to cancel this call, and would log what else it raises."""
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
