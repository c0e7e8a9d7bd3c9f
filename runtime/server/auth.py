"""Who calls, and whether they may: tokens from the metadata of a call, held against the roles of its method.

Asked once a call, before anything of the call is read.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import grpc.aio

from shardray.runtime.driver.caller import Caller
from shardray.runtime.server.status import to_status
from shardray.runtime.server.tokens import Grant, Role, RoleMissingError, TokenFile, UnauthenticatedError

CALLER: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("caller", default=None)
"""Whoever makes the call that is being handled; None where nobody is asked."""

_EXEMPT = "grpc.health.v1.Health"
# Of services, and of methods that ask for others. What is not here is closed to everyone, so that a new service is
# opened on purpose.
_ROLES: dict[str, frozenset[Role]] = {
    "shardray.v1.InferenceService": frozenset({Role.INFERENCE}),
    "shardray.v1.ControlService": frozenset({Role.CONTROL}),
    "vllm.grpc.engine.VllmEngine": frozenset({Role.INFERENCE}),
    "vllm.grpc.engine.VllmEngine/FlushCache": frozenset({Role.CONTROL}),  # what all callers share
    "inference.GRPCInferenceService": frozenset({Role.INFERENCE}),
    "grpc.reflection.v1.ServerReflection": frozenset(Role),
    "grpc.reflection.v1alpha.ServerReflection": frozenset(Role),
}
_BEARER = "bearer "
_TELL_EVERY_S = 60.0
_log = logging.getLogger(__name__)


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Stands before all others. Refusals are told to the log, at most once a minute."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._num_untold = 0
        self._told_s = -_TELL_EVERY_S

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method.strip("/")
        if method.partition("/")[0] == _EXEMPT:
            return await continuation(handler_call_details)
        try:
            grant = self._grant(handler_call_details.invocation_metadata or ())
            handler = await continuation(handler_call_details)
            if handler is not None:
                _check_role(grant, method)
        except (UnauthenticatedError, RoleMissingError) as error:
            return self._refusal(error)
        CALLER.set(grant.caller)
        return handler

    def _grant(self, metadata: Iterable[tuple[str, str | bytes]]) -> Grant:
        shown = [value for key, value in metadata if key == "authorization"]
        if len(shown) != 1 or not isinstance(shown[0], str) or not shown[0].lower().startswith(_BEARER):
            raise UnauthenticatedError("a token is asked for: send it once, as metadata `authorization: Bearer TOKEN`")
        grant = self._tokens.find(shown[0][len(_BEARER) :].strip())
        if grant is None:
            raise UnauthenticatedError("the token is not known here, or not any longer")
        return grant

    def _refusal(self, error: Exception) -> grpc.RpcMethodHandler[Any, Any]:
        status = to_status(error)

        async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._tell(f"from {context.peer()}: {error}")
            await context.abort(status.code, status.details, status.trailing_metadata)

        # Of this kind whatever the method is: it does not wait for a message.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _tell(self, what: str) -> None:
        self._num_untold += 1
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            _log.warning("refused %d calls, the last one %s", self._num_untold, what)
            self._told_s, self._num_untold = time.monotonic(), 0


def _check_role(grant: Grant, method: str) -> None:
    name = method if method in _ROLES else method.partition("/")[0]
    roles = _ROLES.get(name, frozenset())
    if not roles & grant.roles:
        needed = " or ".join(sorted(roles)) or "that no token can have"
        has = ", ".join(sorted(grant.roles))
        raise RoleMissingError(f"{grant.caller.name} has the role {has}, and {name} needs {needed}")
