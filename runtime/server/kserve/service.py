"""inference.GRPCInferenceService over the calls that the native service makes: one door, with two handles."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from shardray import __version__
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.errors import UnknownModelError
from shardray.runtime.engine.request import FieldError
from shardray.runtime.observe.logs import REQUEST_ID
from shardray.runtime.server.inference import InferenceService
from shardray.runtime.server.kserve import describe
from shardray.runtime.server.kserve.requests import Asked, in_their_words, read_request
from shardray.runtime.server.kserve.responses import ResponseMaker
from shardray.runtime.server.merge import answer_all
from shardray.runtime.server.status import to_status

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_EXTENSIONS = ("model_configuration", "model_repository", "parameters", "schedule_policy")
_STATUS_KEY = "triton_grpc_error"
# Of one stream; whether a request is taken is asked for each of them as for any other.
_MAX_UNDER_WAY = 256
_Context = grpc.aio.ServicerContext[Any, Any]


class KserveService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the stubs have no types
    """Handlers raise the errors of the layers below; an interceptor turns them into statuses.

    Within ModelStreamInfer, where one call carries many requests, an error is a message, and the call goes on; with
    `triton_grpc_error: true` in the call's metadata it ends the call, as a status. That is how Triton does it.
    """

    def __init__(self, driver: Driver, inference: InferenceService) -> None:
        self._driver = driver
        self._inference = inference

    async def ServerLive(
        self, request: service_pb2.ServerLiveRequest, context: _Context
    ) -> service_pb2.ServerLiveResponse:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: service_pb2.ServerReadyRequest, context: _Context
    ) -> service_pb2.ServerReadyResponse:
        return service_pb2.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(
        self, request: service_pb2.ModelReadyRequest, context: _Context
    ) -> service_pb2.ModelReadyResponse:
        ready = self._serves(request.name, request.version) and self._is_ready()
        return service_pb2.ModelReadyResponse(ready=ready)

    async def ServerMetadata(
        self, request: service_pb2.ServerMetadataRequest, context: _Context
    ) -> service_pb2.ServerMetadataResponse:
        return service_pb2.ServerMetadataResponse(name="shardray", version=__version__, extensions=_EXTENSIONS)

    async def ModelMetadata(
        self, request: service_pb2.ModelMetadataRequest, context: _Context
    ) -> service_pb2.ModelMetadataResponse:
        self._check_model(request.name, request.version)
        return describe.metadata(request.name)

    async def ModelConfig(
        self, request: service_pb2.ModelConfigRequest, context: _Context
    ) -> service_pb2.ModelConfigResponse:
        self._check_model(request.name, request.version)
        return describe.config(request.name)

    async def RepositoryIndex(
        self, request: service_pb2.RepositoryIndexRequest, context: _Context
    ) -> service_pb2.RepositoryIndexResponse:
        response = service_pb2.RepositoryIndexResponse()
        if (is_ready := self._is_ready()) or not request.ready:
            fleet = self._driver.fleet.snapshot()
            state = "READY" if is_ready else "UNAVAILABLE"
            response.models.add(name=fleet.model_id, version=describe.VERSION, state=state, reason=fleet.reason)
        return response

    async def ModelInfer(
        self, request: service_pb2.ModelInferRequest, context: _Context
    ) -> service_pb2.ModelInferResponse:
        asked = self._read(request)
        if asked.streams:
            raise FieldError("stream", "ModelInfer has one response; call ModelStreamInfer, or leave stream out")
        async with contextlib.aclosing(self._generate(request, asked, context)) as responses:
            return await anext(responses)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[service_pb2.ModelInferRequest], context: _Context
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        ends_call = (_STATUS_KEY, "true") in [(key, value) for key, value in context.invocation_metadata() or ()]

        async def answer(
            request: service_pb2.ModelInferRequest,
        ) -> AsyncGenerator[service_pb2.ModelStreamInferResponse]:
            try:
                async with contextlib.aclosing(self._generate(request, self._read(request), context)) as responses:
                    async for response in responses:
                        yield service_pb2.ModelStreamInferResponse(infer_response=response)
            except Exception as error:
                if ends_call:
                    raise
                yield _failure(request, error)

        async with contextlib.aclosing(answer_all(requests, answer, _MAX_UNDER_WAY)) as responses:
            async for response in responses:
                yield response

    async def _generate(
        self, request: service_pb2.ModelInferRequest, asked: Asked, context: _Context
    ) -> AsyncGenerator[service_pb2.ModelInferResponse]:
        maker = ResponseMaker(request.model_name, request.id, asked)
        timeouts_s = [one for one in (asked.timeout_s, context.time_remaining()) if one is not None]
        try:
            stream = await self._inference.submit(asked.generation, min(timeouts_s, default=None))
            REQUEST_ID.set(stream.request_id)
            try:
                async for delta in stream:
                    if (response := maker.push(delta)) is not None:
                        yield response
            finally:
                self._inference.leave(stream)
        except FieldError as error:
            raise in_their_words(error) from None

    def _is_ready(self) -> bool:
        return self._driver.fleet.snapshot().takes_requests

    def _read(self, request: service_pb2.ModelInferRequest) -> Asked:
        self._check_model(request.model_name, request.model_version)
        return read_request(request)

    def _check_model(self, name: str, version: str) -> None:
        if not self._serves(name, version):
            raise UnknownModelError(f"{name}:{version}" if version else name, self._driver.fleet.model_id)

    def _serves(self, name: str, version: str) -> bool:
        return name == self._driver.fleet.model_id and version in ("", describe.VERSION)


def add_to(server: grpc.aio.Server, driver: Driver, inference: InferenceService) -> None:
    """Answer on the port of ``server``, behind its interceptors."""
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(KserveService(driver, inference), server)


def _failure(request: service_pb2.ModelInferRequest, error: Exception) -> service_pb2.ModelStreamInferResponse:
    status = to_status(error)
    response = service_pb2.ModelStreamInferResponse(error_message=f"[{status.code.name}] {status.details}")
    response.infer_response.id = request.id
    response.infer_response.model_name = request.model_name
    response.infer_response.parameters["triton_final_response"].bool_param = True
    return response
