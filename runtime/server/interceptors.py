"""What surrounds every call. Errors become statuses here; a check of credentials belongs before it in the chain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from shardray.runtime.server.status import to_status

_OUR_SERVICES = "/shardray."
_Context = grpc.aio.ServicerContext[Any, Any]


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose handler raised with the status that ``to_status`` gives the error."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OUR_SERVICES):
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )


def _guard_unary(behavior: Any) -> Any:
    async def guarded(request: Any, context: _Context) -> Any:
        try:
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            return await _abort(context, error)

    return guarded


def _guard_stream(behavior: Any) -> Any:
    async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async for response in behavior(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return guarded


async def _abort(context: _Context, error: Exception) -> None:
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
