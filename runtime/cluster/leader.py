"""The leader's side of the link to the driver: commands go into the engine, its tokens come out on one stream.

The gRPC server has a thread and an asyncio loop of its own; the engine runs in another thread and hands over one list
of outputs a step. Nothing here waits for the driver: what it has not read yet is merged into the next message.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hmac
import threading
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import grpc.aio

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import NAME, TlsFiles
from shardray.runtime.cluster import messages
from shardray.runtime.cluster.messages import SECRET_METADATA_KEY, Rejection
from shardray.runtime.cluster.port_watch import PortWatch
from shardray.runtime.engine.request import EngineRequest, EngineStats, FieldError, ServedModel, TokenOutput
from shardray.v1 import replica_pb2, replica_pb2_grpc

STATS_INTERVAL_S = 0.5
_STOP_TIMEOUT_S = 2.0
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 5_000),  # of a connection that says nothing
    ("grpc.max_connection_idle_ms", 10_000),  # of one that makes no call
    ("grpc.max_receive_message_length", -1),  # a long prompt is the driver's to bound
    ("grpc.max_send_message_length", -1),
    # A driver whose machine vanished says nothing; ping it, so that its requests are cancelled.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class LinkedEngine(Protocol):
    """The thread-safe part of the engine."""

    @property
    def info(self) -> ServedModel: ...
    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...


class LeaderServer:
    """Serves one engine to its driver. Between start and stop, its owner runs ``engine.run(server.publish)``."""

    def start(self, bind_host: str, engine: LinkedEngine, credentials: Credentials) -> int:
        """Listen on a free port of ``bind_host`` and return the port. Only calls that carry the secret are served,
        and with ``credentials.tls`` only over connections with a certificate for the cluster's name.

        Raises RuntimeError if nothing can listen on that host, TlsError.
        """
        if not credentials.secret:
            raise ValueError("secret is empty: anyone could send requests to the engine")
        tls = None if credentials.tls is None else _server_credentials(credentials.tls)
        started: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(bind_host, engine, credentials.secret, tls, started)),
            name="leader-grpc",
            daemon=True,
        )
        self._thread.start()
        return started.result()

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Send one step's outputs. Thread-safe; does not block; outputs after stop are dropped."""
        self._call(self._service.deliver, outputs)

    def stop(self, reason: str = "the replica was stopped") -> None:
        """End every stream with ``reason``, after what is pending; then close the port. Thread-safe and idempotent."""
        self._call(self._service.close, reason)
        self._thread.join(_STOP_TIMEOUT_S * 2)

    def _call(self, function: Any, argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to tell
            self._loop.call_soon_threadsafe(function, argument)

    async def _serve(
        self,
        bind_host: str,
        engine: LinkedEngine,
        secret: str,
        tls: grpc.ServerCredentials | None,
        started: concurrent.futures.Future[int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        server = grpc.aio.server(options=_OPTIONS)
        address = f"[{bind_host}]:0" if ":" in bind_host else f"{bind_host}:0"
        try:
            port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls)
            watch = PortWatch(port)
            self._service = _ReplicaService(engine, secret, watch, tls is not None)
            replica_pb2_grpc.add_ReplicaServiceServicer_to_server(self._service, server)
            await server.start()
        except RuntimeError as error:
            started.set_exception(RuntimeError(f"the leader cannot listen on {bind_host}: {error}"))
            return
        watching = asyncio.create_task(watch.run())
        started.set_result(port)
        await self._service.closed.wait()
        await server.stop(_STOP_TIMEOUT_S)
        watching.cancel()


class _Stream:
    """What one driver has yet to be sent."""

    def __init__(self) -> None:
        self.live: set[str] = set()
        self._outputs: list[TokenOutput] = []
        self._rejections: list[Rejection] = []
        self._stats: EngineStats | None = None
        self._news = asyncio.Event()
        self._ended = False

    def add(self, outputs: list[TokenOutput]) -> None:
        self._outputs += outputs
        self._news.set()

    def reject(self, rejection: Rejection) -> None:
        self._rejections.append(rejection)
        self._news.set()

    def set_stats(self, stats: EngineStats) -> None:
        self._stats = stats
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def messages(self) -> AsyncIterator[replica_pb2.ReplicaEvents]:
        """All that is pending, as often as there is something, until the stream has ended."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._outputs or self._rejections or self._stats is not None:
                events = messages.events_to_proto(self._outputs, self._rejections, self._stats)
                self._outputs, self._rejections, self._stats = [], [], None
                yield events
            elif self._ended:
                return
            if self._ended:
                self._news.set()


class _ReplicaService(replica_pb2_grpc.ReplicaServiceServicer):
    """All methods run in the leader's loop."""

    def __init__(self, engine: LinkedEngine, secret: str, watch: PortWatch, has_tls: bool) -> None:
        self.closed = asyncio.Event()
        self._engine = engine
        self._secret = secret.encode()
        self._watch = watch
        self._has_tls = has_tls
        self._close_reason = ""
        self._streams: set[_Stream] = set()
        self._owners: dict[str, _Stream] = {}
        self._stats_timer: asyncio.TimerHandle | None = None

    async def Run(
        self,
        request_iterator: AsyncIterator[replica_pb2.ReplicaCommand],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[replica_pb2.ReplicaEvents]:
        address = self._watch.know(context.peer())
        if (why := self._objection(context)) is not None:
            self._watch.strangers.refuse(address, why)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)
        stream = _Stream()
        self._streams.add(stream)
        commands = asyncio.create_task(self._read(request_iterator, stream))
        context.add_done_callback(lambda _: self._drop(stream, commands))  # type: ignore[arg-type]
        yield messages.model_event(self._engine.info)
        stream.set_stats(self._engine.stats())
        async for events in stream.messages():
            yield events
        if self.closed.is_set():
            await context.abort(grpc.StatusCode.ABORTED, self._close_reason)

    def deliver(self, outputs: list[TokenOutput]) -> None:
        """Hand each output to the stream that its request came from."""
        batches: dict[_Stream, list[TokenOutput]] = {}
        for output in outputs:
            stream = self._owners.get(output.request_id)
            if stream is not None:
                batches.setdefault(stream, []).append(output)
            if output.finish_reason is not None and stream is not None:
                self._forget(output.request_id, stream)
        for stream, batch in batches.items():
            stream.add(batch)
        if self._owners:
            self._arm_stats_timer()
        elif batches:
            self._send_stats()

    def close(self, reason: str) -> None:
        if not self.closed.is_set():
            self._close_reason = reason
            self.closed.set()
        for stream in self._streams:
            stream.end()

    async def _read(self, commands: AsyncIterator[replica_pb2.ReplicaCommand], stream: _Stream) -> None:
        try:
            async for command in commands:
                if command.WhichOneof("command") == "submit":
                    self._submit(command.submit, stream)
                else:
                    self._engine.cancel(command.cancel.request_id)
        finally:
            stream.end()

    def _objection(self, context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
        """Why this is not the mesh's driver."""
        if self._has_tls and NAME.encode() not in context.auth_context().get("x509_subject_alternative_name", ()):
            return f"its certificate is not valid for the name {NAME}"
        return None if hmac.compare_digest(_secret_of(context), self._secret) else f"wrong {SECRET_METADATA_KEY}"

    def _submit(self, submit: replica_pb2.SubmitCommand, stream: _Stream) -> None:
        request_id = submit.request_id
        # Before the engine knows of it: its first token may be on its way before submit returns.
        self._owners[request_id] = stream
        stream.live.add(request_id)
        try:
            self._engine.submit(messages.request_from_submit(submit))
        except FieldError as error:
            self._forget(request_id, stream)
            stream.reject(Rejection(request_id, error.field, error.message))
        else:
            self._arm_stats_timer()

    def _forget(self, request_id: str, stream: _Stream) -> None:
        self._owners.pop(request_id, None)
        stream.live.discard(request_id)

    def _drop(self, stream: _Stream, commands: asyncio.Task[None]) -> None:
        """Free what a driver that is gone had asked for."""
        commands.cancel()
        self._streams.discard(stream)
        for request_id in list(stream.live):
            self._engine.cancel(request_id)
            self._forget(request_id, stream)

    def _arm_stats_timer(self) -> None:
        if self._stats_timer is None:
            self._stats_timer = asyncio.get_running_loop().call_later(STATS_INTERVAL_S, self._send_stats)

    def _send_stats(self) -> None:
        if self._stats_timer is not None:
            self._stats_timer.cancel()
            self._stats_timer = None
        stats = self._engine.stats()
        for stream in self._streams:
            stream.set_stats(stats)
        if stats.num_running or stats.num_waiting:  # until the engine is seen idle; then no timer runs
            self._arm_stats_timer()


def _server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    ca, cert, key = tls.read()
    return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)


def _secret_of(context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    metadata = dict(context.invocation_metadata() or ())
    secret = metadata.get(SECRET_METADATA_KEY, "")
    return secret.encode() if isinstance(secret, str) else secret
