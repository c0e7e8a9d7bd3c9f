"""What interceptors do with the handler of a method: put something of their own around what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# What the paths of the methods begin with that are handled here; health and reflection have others.
OUR_SERVICES = ("/shardray.", "/vllm.", "/inference.")


def rewrapped(handler: Handler, around: Callable[[Any], Any], parses: bool = False) -> Handler:
    """``handler`` with ``around`` its behavior. With ``parses`` that gets a request's bytes instead of the message."""
    kind = "_".join(
        "stream" if is_stream else "unary" for is_stream in (handler.request_streaming, handler.response_streaming)
    )
    make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
    parse = None if parses else handler.request_deserializer
    return make(around(getattr(handler, kind)), parse, handler.response_serializer)
