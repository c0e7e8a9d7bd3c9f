"""Deltas of a stream → ModelInferResponse."""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2

from shardray.runtime.driver.deltas import Delta
from shardray.runtime.server.kserve.describe import OUTPUTS, VERSION
from shardray.runtime.server.kserve.requests import Asked
from shardray.runtime.server.kserve.tensors import add_output

_FINAL = "triton_final_response"


class ResponseMaker:
    """Of one request: what has come since the last response, and what is counted over all of them."""

    def __init__(self, model_name: str, request_id: str, asked: Asked) -> None:
        self._model_name = model_name
        self._request_id = request_id
        self._asked = asked
        self._text = asked.prompt if asked.with_prompt else ""
        self._token_ids: list[int] = []
        self._logprob = 0.0

    def push(self, delta: Delta) -> service_pb2.ModelInferResponse | None:
        """The next response: when there is text to stream, and at the end. Tokens without text wait for it."""
        self._text += delta.text
        self._token_ids += delta.token_ids
        self._logprob += sum(position.logprob for position in delta.logprobs)
        if delta.finish_reason is None and not (self._asked.streams and self._text):
            return None
        response = self._response(delta)
        self._text, self._token_ids = "", []
        return response

    def _response(self, delta: Delta) -> service_pb2.ModelInferResponse:
        response = service_pb2.ModelInferResponse(
            model_name=self._model_name, model_version=VERSION, id=self._request_id
        )
        response.parameters[_FINAL].bool_param = delta.finish_reason is not None
        for name in self._asked.outputs:
            if (values := self._values(name, delta)) is not None:
                add_output(response, name, OUTPUTS[name][0], values, self._asked.as_raw)
        return response

    def _values(self, name: str, delta: Delta) -> list[Any] | None:
        """None: there is nothing to say yet. Counts and ids are those of this response, as its text is."""
        match name:
            case "text_output":
                return [self._text]
            case "finish_reason":
                return ["None" if delta.finish_reason is None else str(delta.finish_reason)]  # as vLLM's backend does
            case "num_input_tokens":
                return None if delta.usage is None else [delta.usage.num_prompt_tokens]
            case "num_output_tokens":
                return [len(self._token_ids)]
            case "output_ids":
                return self._token_ids
            case "cumulative_logprob":
                return [self._logprob]
        raise AssertionError(name)
