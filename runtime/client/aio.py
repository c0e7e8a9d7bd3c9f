"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self, Unpack

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardray.runtime.client.channel import DEFAULT_ADDRESS, Access, open_aio_channel
from shardray.runtime.client.errors import ServerError, not_ready, readable_errors, to_server_error
from shardray.runtime.client.operations import (
    Progress,
    ShapeOptions,
    drain_request,
    reload_request,
    scale_request,
    to_progress,
)
from shardray.runtime.client.requests import (
    EmbedOptions,
    Prompt,
    SamplingOptions,
    StreamOptions,
    embed_request,
    generate_request,
    tokenize_request,
)
from shardray.runtime.client.results import Completion, Delta, join, to_embeddings
from shardray.runtime.client.resuming import RESUMABLE_S, ResumingStream
from shardray.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

_ABORT_TIMEOUT_S = 1.0


class AsyncClient:
    """Calls one server; make and use it in one event loop. All methods raise ServerError.

    ``timeout_s`` bounds every call that is not given its own; None leaves it to the server. ``access`` has certificates
    and the token; None takes what the environment says (SHARDRAY_CA, SHARDRAY_TOKEN_FILE, ...). Raises AccessError.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, access: Access | None = None
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = open_aio_channel(address, access)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._kept_ids: set[str] = set()  # of requests that the server would keep without this client

    async def stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        resumable_s: float = RESUMABLE_S,
        wait_s: float = 0.0,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of a generation. Closing the iterator, or cancelling its reader, ends the generation.

        A lost connection, or a server that is started again with its journal, is a pause and nothing else, unless
        ``resumable_s`` pass without success; for that long the server keeps the request of a client that vanished.
        0: a lost connection is an error, and ends the generation at once. A server that is full, not ready or not
        there is an error after ``wait_s``.
        """
        request = generate_request(prompt, request_id, priority, options)
        stream = ResumingStream(self.address, request, timeout_s or self._timeout_s, resumable_s, wait_s)
        if stream.must_abort:
            self._kept_ids.add(stream.request_id)
        try:
            while True:
                call = self._inference.Generate(stream.next_request(), timeout=stream.remaining_s())
                try:
                    async for response in call:
                        if (delta := stream.take(response)) is not None:
                            yield delta
                except grpc.aio.AioRpcError as error:
                    await asyncio.sleep(stream.pause_s(error))
                else:
                    return
                finally:
                    call.cancel()
        finally:
            self._kept_ids.discard(stream.request_id)
            if stream.must_abort:
                await self._abort_quietly(stream.request_id)

    async def generate(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> Completion:
        """The whole answer at once. Parameters as for ``stream``."""
        return join([delta async for delta in self.stream(prompt, **options)])

    async def embed(
        self, texts: Sequence[str | Sequence[int]], *, timeout_s: float | None = None, **options: Unpack[EmbedOptions]
    ) -> list[list[float]]:
        """The embedding of each text, or of its token ids; where an encoder is served."""
        request = embed_request(texts, options)
        with readable_errors(self.address):
            return to_embeddings(await self._inference.Embed(request, timeout=timeout_s or self._timeout_s))

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids that ``generate`` would use for a text or for chat messages."""
        with readable_errors(self.address):
            response = await self._inference.Tokenize(tokenize_request(prompt), timeout=self._timeout_s)
            return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids)
        with readable_errors(self.address):
            return (await self._inference.Detokenize(request, timeout=self._timeout_s)).text

    async def model(self) -> inference_pb2.GetModelResponse:
        """What is served."""
        with readable_errors(self.address):
            return await self._inference.GetModel(inference_pb2.GetModelRequest(), timeout=self._timeout_s)

    async def abort(self, request_id: str) -> bool:
        """End a generation by its id; returns whether it was in flight."""
        request = inference_pb2.AbortRequest(request_id=request_id)
        with readable_errors(self.address):
            return (await self._inference.Abort(request, timeout=self._timeout_s)).was_live

    async def fleet(self) -> control_pb2.Fleet:
        """The replicas and their shards, now."""
        with readable_errors(self.address):
            return (await self._control.GetFleet(control_pb2.GetFleetRequest(), timeout=self._timeout_s)).fleet

    async def watch_fleet(self, min_interval_s: float = 0.5) -> AsyncGenerator[control_pb2.Fleet, None]:
        """The fleet now, and again after each change, until the server stops or the iterator is closed."""
        call = self._control.WatchFleet(control_pb2.WatchFleetRequest(min_interval_ms=round(min_interval_s * 1000)))
        with readable_errors(self.address):
            try:
                async for response in call:
                    yield response.fleet
            finally:
                call.cancel()

    async def trace(self, seconds: float = 5.0) -> list[control_pb2.RankTrace]:
        """What every rank did for ``seconds`` from now on; a rank with many spans comes in several parts."""
        with readable_errors(self.address):
            call = self._control.Trace(control_pb2.TraceRequest(seconds=seconds))
            return [response.trace async for response in call]

    def scale(self, **change: Unpack[ShapeOptions]) -> AsyncGenerator[Progress, None]:
        """Run in another shape or on another number of replicas, while clients stream; iterate how far it is.

        Like all operations it begins at once, ends with the iterator, takes as long as it takes, and goes on when the
        iterator is left. Raises ServerError: ABORTED (another operation is under way), FAILED_PRECONDITION (it cannot
        be done), INTERNAL (it failed; the fleet is what it was before).
        """
        return self._progress(self._control.Scale(scale_request(change)))

    def reload(self, source: str) -> AsyncGenerator[Progress, None]:
        """Serve the weights of ``source``, which the server reads as its model.source, replica by replica."""
        return self._progress(self._control.Reload(reload_request(source)))

    def restart(self) -> AsyncGenerator[Progress, None]:
        """Replace every host by a new process, replica by replica."""
        return self._progress(self._control.Restart(control_pb2.RestartRequest()))

    def drain(self, timeout_s: float = 60.0) -> AsyncGenerator[Progress, None]:
        """Take no new requests, let those in flight end for ``timeout_s`` seconds, then stop the server."""
        return self._progress(self._control.Drain(drain_request(timeout_s)))

    async def wait_ready(self, timeout_s: float = 600.0) -> None:
        """Until the server takes requests; it need not have been started yet."""
        failure: ServerError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while (failure := await self._watch_until_serving()) is not None:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise not_ready(self.address, timeout_s, failure) from None

    async def close(self) -> None:
        """End what is running and close the connection."""
        await asyncio.gather(*(self._abort_quietly(request_id) for request_id in self._kept_ids))
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _progress(self, call: Any) -> AsyncGenerator[Progress, None]:
        with readable_errors(self.address):
            try:
                async for response in call:
                    yield to_progress(response)
            finally:
                call.cancel()

    async def _abort_quietly(self, request_id: str) -> None:
        """A server that cannot be told gives the request up by itself, a little later."""
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):  # UsageError: the channel is closed
            await self._inference.Abort(inference_pb2.AbortRequest(request_id=request_id), timeout=_ABORT_TIMEOUT_S)

    async def _watch_until_serving(self) -> ServerError | None:
        """Why not, if the server cannot be reached or went away."""
        call = self._health.Watch(health_pb2.HealthCheckRequest())
        try:
            async for response in call:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return None
        except grpc.aio.AioRpcError as error:
            return to_server_error(error, self.address)
        finally:
            call.cancel()
        return ServerError("UNAVAILABLE", f"{self.address} ended the call")
