"""shardray.v1.InferenceService over a driver."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from array import array
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio

from shardray.runtime.config import GrpcSettings
from shardray.runtime.driver.caller import public_id
from shardray.runtime.driver.deltas import Delta, PositionLogprobs
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.errors import RetryableError, UnavailableError
from shardray.runtime.driver.stream import RequestStream
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.observe.logs import REQUEST_ID
from shardray.runtime.server.auth import CALLER
from shardray.runtime.server.checks import (
    CheckedTexts,
    check_embed,
    check_embeddings_fit,
    check_generate,
    check_request_id,
    check_resume,
    check_token_ids,
    require_tokenizer,
    tokenize,
)
from shardray.runtime.server.messages import encoder_to_proto, finish_to_proto, logprob_to_proto
from shardray.runtime.server.prompt_log import PromptLog
from shardray.v1 import inference_pb2, inference_pb2_grpc

_EMBED_WINDOW = 64  # texts of one call that are under way at once
_RETRY_S = 0.01
_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Handlers raise the errors of the layers below; an interceptor turns them into statuses."""

    def __init__(self, driver: Driver, settings: GrpcSettings) -> None:
        self._driver = driver
        self._max_message_bytes = settings.max_message_bytes
        self._prompts = PromptLog(driver.tokenizer, settings.log_prompts)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        driver = self._driver
        if request.HasField("resume"):
            request_id, num_seen_tokens, num_seen_chars = check_resume(request)
            stream = await driver.resume(_own_id(request_id), num_seen_tokens, num_seen_chars)
        else:
            stream = await self.submit(request, context.time_remaining())
        REQUEST_ID.set(stream.request_id)
        request_id = public_id(stream.request_id)
        try:
            seed = stream.entry.params.seed
            if stream.entry.resumable_s:
                await driver.journal.sync()
                yield _response(request_id, Delta(), seed)
                seed = None
            async for delta in stream:
                yield _response(request_id, delta, seed)
                seed = None
        finally:  # cancel, deadline, lost connection, a client that does not read, last token
            self.leave(stream)

    async def submit(self, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> RequestStream:
        """Check and take a request, of this service or of one that translates to it; ``leave`` what is returned."""
        driver = self._driver
        model = driver.check_available()
        driver.admission.check(CALLER.get())  # before work is done for it
        checked = await check_generate(request, driver.tokenizer, model, secrets.randbits(64))
        driver.admission.check(CALLER.get())  # others may have come meanwhile
        request_id = _own_id(checked.request_id)
        stream = driver.submit(
            request_id, checked.prompt_ids, checked.params, timeout_s, checked.priority, checked.resumable_s
        )
        self._prompts.accepted(stream.entry)
        return stream

    def leave(self, stream: RequestStream) -> None:
        """Its call is over."""
        self._driver.release(stream)
        self._prompts.left(stream.entry)

    async def Embed(self, request: inference_pb2.EmbedRequest, context: _Context) -> inference_pb2.EmbedResponse:
        driver = self._driver
        model = driver.check_available()
        driver.admission.check(CALLER.get())
        checked = await check_embed(request, driver.tokenizer, model)
        driver.admission.check(CALLER.get())
        response = inference_pb2.EmbedResponse()
        response.usage.num_prompt_tokens = sum(map(len, checked.texts))
        async with contextlib.aclosing(self._embed(checked, context)) as embeddings:
            async for embedding in embeddings:
                response.embeddings.add(values=array("f", embedding))
                if len(response.embeddings) == 1:
                    check_embeddings_fit(len(checked.texts), response.ByteSize(), self._max_message_bytes)
        return response

    async def _embed(self, checked: CheckedTexts, context: _Context) -> AsyncGenerator[bytes]:
        """In the order of the texts. The call was let in, so texts that find no place wait, and are not refused."""
        driver, under_way = self._driver, deque[RequestStream]()
        try:
            for prompt_ids in checked.texts:
                while under_way and (len(under_way) == _EMBED_WINDOW or not self._has_place()):
                    yield await _next_embedding(under_way)
                await self._wait_for_place(driver.admission.bound_s(context.time_remaining()))
                request_id, timeout_s = _own_id(f"emb-{uuid.uuid4().hex}"), context.time_remaining()
                params, priority, pooling = SamplingParams(seed=0), checked.priority, checked.pooling
                stream = driver.submit(request_id, prompt_ids, params, timeout_s, priority, pooling=pooling)
                under_way.append(stream)
            while under_way:
                yield await _next_embedding(under_way)
        finally:
            for stream in under_way:
                driver.release(stream)

    def _has_place(self) -> bool:
        with contextlib.suppress(RetryableError):
            self._driver.admission.check(CALLER.get())
            return True
        return False

    async def _wait_for_place(self, timeout_s: float) -> None:
        """Raises what refuses a request still, after ``timeout_s``."""
        ends_s = time.monotonic() + timeout_s
        while not self._has_place():
            if time.monotonic() > ends_s:
                self._driver.admission.check(CALLER.get())
            await asyncio.sleep(_RETRY_S)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(token_ids=await tokenize(request, self._driver.tokenizer))

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: _Context
    ) -> inference_pb2.DetokenizeResponse:
        tokenizer = require_tokenizer("token_ids", self._driver.tokenizer)
        check_token_ids("token_ids", request.token_ids, tokenizer.vocab_size)
        return inference_pb2.DetokenizeResponse(text=tokenizer.decode(list(request.token_ids)))

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: _Context
    ) -> inference_pb2.GetModelResponse:
        model = self._driver.model or self._driver.check_available()
        tokenizer = self._driver.tokenizer
        return inference_pb2.GetModelResponse(
            model_id=self._driver.fleet.model_id,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=model.eos_token_ids,
            num_kv_tokens=model.num_kv_tokens,
            takes_text=tokenizer is not None,
            takes_chat=tokenizer is not None and tokenizer.has_chat_template,
            encoder=encoder_to_proto(model.encoder),
        )

    async def Abort(self, request: inference_pb2.AbortRequest, context: _Context) -> inference_pb2.AbortResponse:
        return inference_pb2.AbortResponse(was_live=self._driver.abort(_own_id(check_request_id(request.request_id))))


def _own_id(request_id: str) -> str:
    """Under which the driver knows a request of whoever calls."""
    caller = CALLER.get()
    return request_id if caller is None else caller.own_id(request_id)


async def _next_embedding(under_way: deque[RequestStream]) -> bytes:
    """Of the first stream, which is taken out once it has ended."""
    deltas = [delta async for delta in under_way[0]]
    under_way.popleft()
    if deltas[-1].embedding is None:  # ended by the operator's hand
        raise UnavailableError("the request was aborted", 0.0)
    return deltas[-1].embedding


def _response(request_id: str, delta: Delta, seed: int | None) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request_id=request_id, text=delta.text, token_ids=delta.token_ids, seed=seed
    )
    if delta.logprobs:
        response.logprobs.extend(map(_logprobs, delta.logprobs))
    if delta.finish_reason is not None:
        response.finish_reason = finish_to_proto(delta.finish_reason)
    if delta.usage is not None:
        response.usage.num_prompt_tokens = delta.usage.num_prompt_tokens
        response.usage.num_output_tokens = delta.usage.num_output_tokens
        response.usage.num_cached_prompt_tokens = delta.usage.num_cached_prompt_tokens
    if delta.timing is not None:
        response.timing.queue_s = delta.timing.queue_s
        response.timing.total_s = delta.timing.total_s
        if delta.timing.time_to_first_token_s is not None:
            response.timing.time_to_first_token_s = delta.timing.time_to_first_token_s
    return response


def _logprobs(position: PositionLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        chosen=logprob_to_proto(position.token_id, position.logprob),
        top=[logprob_to_proto(token_id, logprob) for token_id, logprob in position.top],
    )
