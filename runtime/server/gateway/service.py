"""vllm.grpc.engine.VllmEngine: another language for what shardray.v1.InferenceService does.

Each request becomes one of that service and is handled there, from its checks to the release of its pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from shardray.runtime.driver.caller import Caller
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.errors import DuplicateRequestError
from shardray.runtime.engine.request import FieldError
from shardray.runtime.server.auth import CALLER
from shardray.runtime.server.gateway.loads import loads_of
from shardray.runtime.server.gateway.requests import choice_id, field_of, num_choices, to_native
from shardray.runtime.server.gateway.responses import Choice
from shardray.runtime.server.gateway.tokenizer_bundle import in_chunks, zip_tokenizer
from shardray.runtime.server.inference import InferenceService
from shardray.runtime.server.merge import answer_all
from shardray.v1 import inference_pb2

T = TypeVar("T")
_Context = grpc.aio.ServicerContext[Any, Any]


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc] # the package has no stubs of it
    """The whole fleet is one engine. ``model_name`` None: that of the driver."""

    def __init__(self, driver: Driver, inference: InferenceService, model_name: str | None = None) -> None:
        self._driver = driver
        self._inference = inference
        self._model_name = model_name
        self._num_choices: dict[tuple[Caller | None, str], int] = {}  # of requests under way that have several

    async def Generate(
        self, request: vllm_engine_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[vllm_engine_pb2.GenerateResponse]:
        request_id = request.request_id or f"req-{uuid.uuid4().hex}"
        natives = self._natives(request_id, request)
        num_prompt_tokens, stop_ids = len(request.tokenized.input_ids), set(request.sampling_params.stop_token_ids)
        choices = [Choice(index, request.stream, num_prompt_tokens, stop_ids) for index in range(len(natives))]
        with self._counted(request_id, len(natives)), _fields_named_as_here():
            async with contextlib.aclosing(self._answers(natives, context)) as answers:
                async for index, response in answers:
                    for message in choices[index].messages(response):
                        yield message

    async def Abort(self, request: vllm_engine_pb2.AbortRequest, context: _Context) -> vllm_engine_pb2.AbortResponse:
        """Those that are not under way any longer are passed over."""
        for request_id in request.request_ids:
            for index in range(self._num_choices.get((CALLER.get(), request_id), 1)):
                native = inference_pb2.AbortRequest(request_id=choice_id(request_id, index))
                await self._inference.Abort(native, context)
        return vllm_engine_pb2.AbortResponse()

    async def Embed(self, request: vllm_engine_pb2.EmbedRequest, context: _Context) -> vllm_engine_pb2.EmbedResponse:
        native = inference_pb2.EmbedRequest()
        native.inputs.add().token_ids.ids.extend(request.tokenized.input_ids)
        with _fields_named_as_here():
            response = await self._inference.Embed(native, context)
        values = response.embeddings[0].values
        return vllm_engine_pb2.EmbedResponse(
            embedding=values, prompt_tokens=response.usage.num_prompt_tokens, embedding_dim=len(values)
        )

    async def HealthCheck(
        self, request: vllm_engine_pb2.HealthCheckRequest, context: _Context
    ) -> vllm_engine_pb2.HealthCheckResponse:
        status = self._driver.fleet.snapshot()
        message = f"{status.state}: {status.reason}" if status.reason else str(status.state)
        return vllm_engine_pb2.HealthCheckResponse(healthy=status.takes_requests, message=message)

    async def GetModelInfo(
        self, request: vllm_engine_pb2.GetModelInfoRequest, context: _Context
    ) -> vllm_engine_pb2.GetModelInfoResponse:
        model = self._driver.model or self._driver.check_available()
        name = self._model_name or self._driver.fleet.model_id
        tokenizer = self._driver.tokenizer
        context_len = model.max_request_len if model.encoder is None else model.encoder.max_prompt_len
        return vllm_engine_pb2.GetModelInfoResponse(
            model_path=name,
            served_model_name=name,
            # A gateway on this machine reads it there, one elsewhere finds nothing and asks for it. By its name smg
            # would look for it on a hub first, where something else may go by that name.
            tokenizer_path="" if tokenizer is None else str(tokenizer.folder),
            is_generation=model.default_pooling is None,
            max_context_length=context_len,
            max_req_input_len=context_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        )

    async def GetServerInfo(
        self, request: vllm_engine_pb2.GetServerInfoRequest, context: _Context
    ) -> vllm_engine_pb2.GetServerInfoResponse:
        status = self._driver.fleet.snapshot()
        return vllm_engine_pb2.GetServerInfoResponse(
            server_type="shardray",
            active_requests=status.num_live_requests,
            uptime_seconds=time.time() - status.start_time_s,
            data_parallel_size=1,
            block_size=max((replica.stats.block_size for replica in status.replicas), default=0),
        )

    async def GetLoads(
        self, request: vllm_engine_pb2.GetLoadsRequest, context: _Context
    ) -> vllm_engine_pb2.GetLoadsResponse:
        return loads_of(self._driver.fleet.snapshot())

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: _Context
    ) -> AsyncIterator[common_pb2.GetTokenizerChunk]:
        tokenizer = self._driver.tokenizer
        if tokenizer is None or tokenizer.folder is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the model has no tokenizer")
        for chunk in in_chunks(await asyncio.to_thread(zip_tokenizer, tokenizer.folder)):
            yield chunk

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: _Context
    ) -> AsyncIterator[common_pb2.KvEventBatch]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what the replicas hold is not told")
        yield common_pb2.KvEventBatch()  # makes it the stream that the method is

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: _Context
    ) -> common_pb2.FlushCacheResponse:
        self._driver.forget_prefixes()
        return common_pb2.FlushCacheResponse(success=True, message="what was computed so far is shared no more")

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: _Context
    ) -> common_pb2.ProfileResponse:
        return common_pb2.ProfileResponse(success=False, message="use `shardray trace`")

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: _Context
    ) -> common_pb2.ProfileResponse:
        return common_pb2.ProfileResponse(success=False, message="use `shardray trace`")

    def _natives(
        self, request_id: str, request: vllm_engine_pb2.GenerateRequest
    ) -> list[inference_pb2.GenerateRequest]:
        model = self._driver.check_available()
        return [to_native(request_id, request, model, index) for index in range(num_choices(request))]

    async def _answers(
        self, natives: list[inference_pb2.GenerateRequest], context: _Context
    ) -> AsyncGenerator[tuple[int, inference_pb2.GenerateResponse]]:
        async def answer(
            choice: tuple[int, inference_pb2.GenerateRequest],
        ) -> AsyncGenerator[tuple[int, inference_pb2.GenerateResponse]]:
            index, native = choice
            async with contextlib.aclosing(self._inference.Generate(native, context)) as responses:
                async for response in responses:
                    yield index, response

        choices = list(enumerate(natives))
        one = len(choices) == 1  # then without tasks
        answers = answer(choices[0]) if one else answer_all(_each(choices), answer, len(choices))
        async with contextlib.aclosing(answers):
            async for answered in answers:
                yield answered

    @contextlib.contextmanager
    def _counted(self, request_id: str, count: int) -> Iterator[None]:
        """So that Abort finds all choices. Raises DuplicateRequestError."""
        key = CALLER.get(), request_id
        if key in self._num_choices:
            raise DuplicateRequestError(request_id)
        self._num_choices[key] = count
        try:
            yield
        finally:
            del self._num_choices[key]


@contextlib.contextmanager
def _fields_named_as_here() -> Iterator[None]:
    try:
        yield
    except FieldError as error:
        raise FieldError(field_of(error.field), error.message) from None


async def _each(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item
