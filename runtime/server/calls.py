"""Counts calls by method and status, and notes the trace that each belongs to.

It stands outside of every other interceptor, and so sees what those refuse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from shardray.runtime.observe.trace_context import note_trace_context
from shardray.runtime.server.handlers import OUR_SERVICES, Handler, rewrapped

OnCall = Callable[[str, str], None]  # method ("Generate") and code ("OK") of a call that has ended

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class CallCounter(grpc.aio.ServerInterceptor):
    """Tells ``on_call`` of each call of our services. Its cost is one call more for each call, none for a message."""

    def __init__(self, on_call: OnCall) -> None:
        self._on_call = on_call

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        name = handler_call_details.method
        if handler is None or not name.startswith(OUR_SERVICES):
            return handler
        # What refuses a call may be of another kind than its method.
        return rewrapped(handler, lambda behavior: self._counted(behavior, name.rpartition("/")[2]))

    def _counted(self, behavior: Any, method: str) -> Any:
        async def counted(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            code = "UNKNOWN"
            note_trace_context(context.invocation_metadata())
            try:
                response = await behavior(request, context)
                code = _code_of(context)
                return response
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except grpc.aio.AbortError:
                code = _code_of(context)
                raise
            finally:
                self._on_call(method, code)

        return counted


def _code_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else _CODES.get(code, "OK")
