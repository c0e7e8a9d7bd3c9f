"""Requests of vllm.grpc.engine → those of shardray.v1, which are then checked as any others."""

from __future__ import annotations

import numpy as np
from smg_grpc_proto import vllm_engine_pb2

from shardray.runtime.engine.request import FieldError, ServedModel, given_ids
from shardray.runtime.server.numbers import as_written
from shardray.v1 import common_pb2, inference_pb2

_MAX_CHOICES = 128
_MEDIA = ("mm_inputs", "extra_mm_inputs", "media_refs")
_UNSUPPORTED = frozenset(("kv_transfer_params", "kv_transfer_params_json", *_MEDIA))
_UNSUPPORTED_SAMPLING = frozenset(("prompt_logprobs", "truncate_prompt_tokens", "structural_tag"))
_ANY_OBJECT = '{"type": "object"}'
_INTEGERS = ("top_k", "min_tokens", "ignore_eos")
_FLOATS = ("min_p", "presence_penalty", "frequency_penalty")
_FLOATS_UNSET_IF_0 = ("top_p", "repetition_penalty")  # 0 is no value of theirs, and they cannot be absent
_FIELDS = {
    "prompt": "input", "token_ids": "tokenized.input_ids", "token_ids.ids": "tokenized.input_ids",
    "sampling.choices": "sampling_params.choice",
}  # fmt: skip


def num_choices(request: vllm_engine_pb2.GenerateRequest) -> int:
    """Raises FieldError."""
    count = request.sampling_params.n or 1
    if count > _MAX_CHOICES:
        raise FieldError("sampling_params.n", f"{count} is outside [1, {_MAX_CHOICES}]")
    return int(count)


def choice_id(request_id: str, index: int) -> str:
    """Under which choice ``index`` of a request runs."""
    return f"{request_id}-{index}" if index else request_id


def to_native(
    request_id: str, request: vllm_engine_pb2.GenerateRequest, model: ServedModel, index: int = 0
) -> inference_pb2.GenerateRequest:
    """The request for one choice. Raises FieldError for what it asks for and nobody here can do."""
    _check_supported("", request, _UNSUPPORTED)
    _check_supported("sampling_params.", request.sampling_params, _UNSUPPORTED_SAMPLING)
    native = inference_pb2.GenerateRequest(request_id=choice_id(request_id, index))
    match request.WhichOneof("input"):
        case "tokenized":
            native.token_ids.ids.extend(request.tokenized.input_ids)
        case "text":
            native.text = request.text
    native.sampling.CopyFrom(_sampling(request.sampling_params, index))
    if native.HasField("token_ids") and not request.sampling_params.HasField("max_tokens"):
        # In vLLM that means what the context window leaves. Where there is no room, the prompt is refused as too long.
        given = given_ids(tuple(native.token_ids.ids), None, model.encoder)
        native.sampling.max_tokens = max(1, model.max_request_len - len(given))
    return native


def field_of(native_field: str) -> str:
    """Where a gateway's request has what ``native_field`` names."""
    if native_field.startswith("sampling.") and native_field not in _FIELDS:
        return "sampling_params." + native_field.removeprefix("sampling.")
    return _FIELDS.get(native_field, native_field)


def _check_supported(prefix: str, message: object, unsupported: frozenset[str]) -> None:
    for field, _ in message.ListFields():  # type: ignore[attr-defined] # any message
        if field.name in unsupported:
            raise FieldError(prefix + field.name, "is not supported here; leave it out")


def _sampling(params: vllm_engine_pb2.SamplingParams, index: int) -> common_pb2.SamplingParameters:
    native = common_pb2.SamplingParameters(stop=params.stop, stop_token_ids=params.stop_token_ids)
    for name in _INTEGERS:
        setattr(native, name, getattr(params, name))
    for name in (*_FLOATS, *(name for name in _FLOATS_UNSET_IF_0 if getattr(params, name) != 0.0)):
        setattr(native, name, as_written(np.float32(getattr(params, name))))
    if params.HasField("temperature"):
        native.temperature = as_written(np.float32(params.temperature))
    if params.HasField("max_tokens"):
        native.max_tokens = params.max_tokens
    if params.HasField("logprobs"):
        native.logprobs = _unsigned("sampling_params.logprobs", params.logprobs)
    if params.HasField("seed"):
        native.seed = (params.seed + index) % 2**64  # each choice has noise of its own
    for token_id, bias in params.logit_bias.items():
        native.logit_bias[_unsigned("sampling_params.logit_bias", token_id)] = as_written(np.float32(bias))
    _constrain(native, params)
    return native


def _constrain(native: common_pb2.SamplingParameters, params: vllm_engine_pb2.SamplingParams) -> None:
    match params.WhichOneof("constraint"):
        case "json_schema" | "regex" | "grammar" as kind:
            setattr(native, kind, getattr(params, kind))
        case "json_object" if params.json_object:
            native.json_schema = _ANY_OBJECT
        case "choice" if not params.choice.choices:
            raise FieldError("sampling_params.choice", "has no choices")
        case "choice":
            native.choices.extend(params.choice.choices)


def _unsigned(field: str, value: int) -> int:
    if value < 0:
        raise FieldError(field, f"{value} is negative")
    return value
