"""Responses of shardray.v1 → those of vllm.grpc.engine."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from smg_grpc_proto import vllm_engine_pb2

from shardray.v1 import common_pb2, inference_pb2

_FINISHES = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORTED: "abort",
    common_pb2.FINISH_REASON_ERROR: "error",
}


class Choice:
    """One of the outputs of a request: a chunk for each delta if it ``is_streamed``, and one message at its end.

    Both hold token ids, no text: gateways have the tokenizer.
    """

    def __init__(self, index: int, is_streamed: bool, num_prompt_tokens: int, stop_token_ids: Collection[int]) -> None:
        self._index = index
        self._is_streamed = is_streamed
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_token_ids = stop_token_ids
        self._token_ids: list[int] = []
        self._logprobs: list[inference_pb2.TokenLogprobs] = []

    def messages(self, response: inference_pb2.GenerateResponse) -> Iterator[vllm_engine_pb2.GenerateResponse]:
        self._token_ids.extend(response.token_ids)
        if not self._is_streamed:
            self._logprobs.extend(response.logprobs)
        elif response.token_ids:
            yield vllm_engine_pb2.GenerateResponse(chunk=self._chunk(response))
        if response.finish_reason:
            yield vllm_engine_pb2.GenerateResponse(complete=self._complete(response))

    def _chunk(self, response: inference_pb2.GenerateResponse) -> vllm_engine_pb2.GenerateStreamChunk:
        return vllm_engine_pb2.GenerateStreamChunk(
            token_ids=response.token_ids,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(response.token_ids),
            output_logprobs=_logprobs(response.logprobs),
            index=self._index,
        )

    def _complete(self, response: inference_pb2.GenerateResponse) -> vllm_engine_pb2.GenerateComplete:
        complete = vllm_engine_pb2.GenerateComplete(
            output_ids=[] if self._is_streamed else self._token_ids,
            finish_reason=_FINISHES[response.finish_reason],
            prompt_tokens=response.usage.num_prompt_tokens,
            completion_tokens=response.usage.num_output_tokens,
            cached_tokens=response.usage.num_cached_prompt_tokens,
            output_logprobs=_logprobs(self._logprobs),
            index=self._index,
        )
        stopped = response.finish_reason == common_pb2.FINISH_REASON_STOP
        if stopped and self._token_ids and self._token_ids[-1] in self._stop_token_ids:
            complete.matched_token_id = self._token_ids[-1]
        return complete


def _logprobs(positions: Iterable[inference_pb2.TokenLogprobs]) -> vllm_engine_pb2.OutputLogProbs | None:
    if not positions:
        return None
    result = vllm_engine_pb2.OutputLogProbs()
    for position in positions:
        result.token_ids.append(position.chosen.token_id)
        result.token_logprobs.append(position.chosen.logprob)
        result.top_logprobs.add(
            token_ids=[top.token_id for top in position.top], values=[top.logprob for top in position.top]
        )
    return result
