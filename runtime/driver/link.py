"""The driver's side of the stream to one replica's leader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import NAME, TlsError, TlsFiles
from shardray.runtime.cluster import messages
from shardray.runtime.cluster.messages import SECRET_METADATA_KEY, Rejection
from shardray.runtime.engine.request import EngineRequest, EngineStats, ServedModel, TokenOutput
from shardray.v1 import replica_pb2, replica_pb2_grpc

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # hosts of one cluster reach each other directly
]
_Call = grpc.aio.StreamStreamCall[replica_pb2.ReplicaCommand, replica_pb2.ReplicaEvents]


class LinkError(ConnectionError):
    """A replica's leader cannot be reached or refuses the driver."""


class ReplicaLink:
    """One stream to one leader; use it in the loop that made it.

    ``on_events(outputs, rejections)`` is called in that loop, once for each message. ``closed`` resolves to the reason
    when the stream has ended, whoever ended it.
    """

    def __init__(
        self,
        on_events: Callable[[list[TokenOutput], list[Rejection]], None],
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
    ) -> None:
        self.stats = EngineStats()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._on_events = on_events
        self._on_stats = on_stats
        self._commands: asyncio.Queue[replica_pb2.ReplicaCommand | None] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None

    async def connect(self, address: str, credentials: Credentials, timeout_s: float = 10.0) -> ServedModel:
        """Open the stream; returns what the replica serves. Raises LinkError with the reason in one line."""
        self._channel = _open_channel(address, credentials.tls)
        stub = replica_pb2_grpc.ReplicaServiceStub(self._channel)
        call = stub.Run(self._outgoing(), metadata=((SECRET_METADATA_KEY, credentials.secret),))
        events = aiter(call)
        try:
            async with asyncio.timeout(timeout_s):
                hello = await anext(events)
        except TimeoutError:
            await self._channel.close()
            raise LinkError(f"the leader at {address} did not answer within {timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            await self._channel.close()
            raise LinkError(f"the leader at {address} refused: {error.details()}") from None
        except StopAsyncIteration:
            await self._channel.close()
            raise LinkError(f"the leader at {address} ended the stream at once") from None
        self._reader = asyncio.create_task(self._read(call, events))
        return messages.model_from_event(hello)

    def submit(self, request: EngineRequest) -> None:
        self._commands.put_nowait(messages.submit_command(request))

    def cancel(self, request_id: str) -> None:
        self._commands.put_nowait(messages.cancel_command(request_id))

    async def close(self) -> None:
        """End the stream; the leader cancels what is left. Idempotent."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            await self._channel.close()

    async def _outgoing(self) -> AsyncIterator[replica_pb2.ReplicaCommand]:
        while (command := await self._commands.get()) is not None:
            yield command

    async def _read(self, call: _Call, stream: AsyncIterator[replica_pb2.ReplicaEvents]) -> None:
        reason = "the driver closed the link"
        try:
            async for events in stream:
                if events.HasField("stats"):
                    self.stats = messages.stats_from_proto(events.stats)
                    self._on_stats(self.stats)
                if events.tokens or events.rejected:
                    self._on_events(messages.outputs_from_events(events), messages.rejections_from_events(events))
            reason = "the leader ended the stream"
        except grpc.aio.AioRpcError as error:
            told = error.code() is grpc.StatusCode.ABORTED
            reason = error.details() or error.code().name
            reason = reason if told else f"the connection to its leader was lost ({reason})"
        finally:
            self._commands.put_nowait(None)  # ends the outgoing side, which would be left waiting otherwise
            call.cancel()
            self.closed.set_result(reason)


def _open_channel(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    try:
        ca, cert, key = tls.read()
    except TlsError as error:
        raise LinkError(str(error)) from error
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.aio.secure_channel(address, credentials, [*_OPTIONS, ("grpc.ssl_target_name_override", NAME)])
