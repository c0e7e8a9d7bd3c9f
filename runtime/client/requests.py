"""Python values → request messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, TypedDict, cast

from google.protobuf.message import Message

from shardray.runtime.client.errors import ServerError
from shardray.v1 import common_pb2, inference_pb2

# Text, token ids, or chat messages such as {"role": "user", "content": "Hello"}.
Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]


class SamplingOptions(TypedDict, total=False):
    """Fields of ``SamplingParameters`` in common.proto; what is left out, or None, is the server's default."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    stop_token_ids: Sequence[int] | None
    stop: Sequence[str] | None
    logprobs: int | None
    forced: Sequence[int] | None  # ids
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | None
    json_schema: str | Mapping[str, object] | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None


class StreamOptions(SamplingOptions, total=False):
    """What ``stream`` takes beside the prompt; its signature has the defaults."""

    request_id: str
    priority: int
    timeout_s: float | None
    resumable_s: float
    wait_s: float


class EmbedOptions(TypedDict, total=False):
    """How embeddings are made; what is left out, or None, is the model's own way."""

    pooling: Literal["mean", "cls", "last"] | None
    normalize: bool | None
    truncate: bool
    priority: int


def generate_request(
    prompt: Prompt, request_id: str, priority: int, options: SamplingOptions
) -> inference_pb2.GenerateRequest:
    """Raises ServerError (INVALID_ARGUMENT) for a value that no message can hold, TypeError for an unknown option."""
    request = inference_pb2.GenerateRequest(request_id=request_id, priority=priority)
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat_messages(cast(Sequence[Mapping[str, str]], prompt)))
    else:
        _set_ids(request.token_ids, cast(Sequence[int], prompt))
    for name, value in options.items():
        if name not in common_pb2.SamplingParameters.DESCRIPTOR.fields_by_name:
            raise TypeError(f"unknown sampling option {name!r}; known: {', '.join(SamplingOptions.__annotations__)}")
        if name == "forced" and value is not None:
            _set_ids(request.sampling.forced, cast(Sequence[int], value))
        elif name == "json_schema" and isinstance(value, Mapping):
            request.sampling.json_schema = _as_json(name, value)
        elif value is not None:
            set_field(request.sampling, name, value)
    return request


def embed_request(texts: Sequence[str | Sequence[int]], options: EmbedOptions) -> inference_pb2.EmbedRequest:
    """Raises ServerError (INVALID_ARGUMENT) for a value that no message can hold."""
    request = inference_pb2.EmbedRequest(truncate=options.get("truncate", False), priority=options.get("priority", 0))
    if (pooling := options.get("pooling")) is not None:
        mode = f"POOLING_MODE_{str(pooling).upper()}"
        if mode not in common_pb2.PoolingMode.DESCRIPTOR.values_by_name:
            raise _bad_field("pooling", f"{pooling!r} is not known; give mean, cls or last")
        request.pooling.mode = common_pb2.PoolingMode.Value(mode)
    if (normalize := options.get("normalize")) is not None:
        request.pooling.normalize = normalize
    for text in texts:
        entry = request.inputs.add()
        if isinstance(text, str):
            entry.text = text
        else:
            _set_ids(entry.token_ids, text)
    return request


def tokenize_request(prompt: str | Sequence[Mapping[str, str]]) -> inference_pb2.TokenizeRequest:
    if isinstance(prompt, str):
        return inference_pb2.TokenizeRequest(text=prompt)
    return inference_pb2.TokenizeRequest(chat=chat_messages(prompt))


def chat_messages(messages: Sequence[Mapping[str, str]]) -> inference_pb2.ChatMessages:
    """Raises ServerError (INVALID_ARGUMENT) for a message without role or content."""
    chat = inference_pb2.ChatMessages()
    for index, message in enumerate(messages):
        missing = [key for key in ("role", "content") if not isinstance(message.get(key), str)]
        if missing:
            raise _bad_field(f"chat.messages[{index}].{missing[0]}", "is missing or no text")
        chat.messages.add(role=message["role"], content=message["content"])
    return chat


def _as_json(name: str, value: Mapping[str, object]) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        raise _bad_field(name, f"{value!r:.80} is no JSON") from None


def _set_ids(message: common_pb2.TokenIds, ids: Sequence[int]) -> None:
    """Also no ids are given ids."""
    message.SetInParent()
    set_field(message, "ids", ids)


def set_field(message: Message, name: str, value: object) -> None:
    """Raises ServerError (INVALID_ARGUMENT) for a value that the field cannot hold."""
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError):
        raise _bad_field(name, f"{value!r:.80} is not accepted") from None


def _bad_field(field: str, description: str) -> ServerError:
    return ServerError("INVALID_ARGUMENT", f"{field}: {description}", {field: description})
