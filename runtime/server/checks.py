"""Checks what a client wrote and turns it into what the driver takes. Nothing past this point fails because of it.

Every refusal is a FieldError that names the proto field, the value, and what would be accepted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from shardray.runtime.engine.grammars import check_constraint, is_known
from shardray.runtime.engine.request import (
    CONSTRAINT_KINDS,
    Constraint,
    EngineRequest,
    FieldError,
    SamplingParams,
    ServedModel,
    given_ids,
)
from shardray.runtime.model.spec import Pooling
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.messages import DEFAULT_MAX_TOKENS, params_from_proto, pooling_from_proto
from shardray.v1 import common_pb2, inference_pb2

_MAX_REQUEST_ID_LEN = 128
_MAX_PRIORITY = 100
_MAX_STOPS = 16
_MAX_STOP_LEN = 256
_MAX_STOP_TOKEN_IDS = 128
_MAX_LOGIT_BIASES = 1024
_MAX_FORCED_IDS = 128
_MAX_CONSTRAINT_LEN = 65_536  # characters
_MAX_CHOICES = 1024
_GRAMMARS = ThreadPoolExecutor(1, "grammars")  # what takes long holds up its like, and no prompt
_MAX_INPUTS = 1024
_MAX_TEXT_LEN = 1 << 20  # characters
_MAX_TOKEN_LEN = 256  # characters; longer than the tokens of any vocabulary in use, runs of blanks included
_LONG_TEXT_LEN = 16_384  # characters; tokenizing more would hold up the other streams


@dataclasses.dataclass(frozen=True)
class CheckedTexts:
    """Texts of which the model can make embeddings."""

    texts: list[tuple[int, ...]]
    pooling: Pooling
    priority: int


@dataclasses.dataclass(frozen=True)
class CheckedRequest:
    """A generation that the model can run."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int
    resumable_s: float


async def check_generate(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer | None, model: ServedModel, default_seed: int
) -> CheckedRequest:
    """Raises FieldError."""
    request_id = check_request_id(request.request_id) if request.request_id else f"req-{uuid.uuid4().hex}"
    _check_priority(request.priority)
    if not request.resumable_s >= 0 or math.isinf(request.resumable_s):
        raise FieldError("resumable_s", f"{request.resumable_s} is no duration; give seconds, or 0")
    _check_sampling_sizes(request.sampling, model)
    if request.sampling.stop:
        require_tokenizer("sampling.stop", tokenizer)
    prompt_ids = await _prompt_ids(request, tokenizer, model)
    params = _sampling_params(request.sampling, prompt_ids, model, default_seed)
    checked = CheckedRequest(request_id, prompt_ids, params, request.priority, request.resumable_s)
    # The engine's own check, so that the two cannot drift apart.
    engine_request = EngineRequest(request_id=request_id, prompt_ids=prompt_ids, params=params)
    engine_request.check(model)
    if params.constraint is not None:
        await _check_constraint(params.constraint, tokenizer)
    return checked


async def _check_constraint(constraint: Constraint, tokenizer: Tokenizer | None) -> None:
    field = f"sampling.{constraint.kind}"
    require_tokenizer(field, tokenizer)
    if is_known(constraint):
        return
    try:
        await asyncio.get_running_loop().run_in_executor(_GRAMMARS, check_constraint, constraint)
    except FieldError as error:
        raise FieldError(field, error.message) from None


async def check_embed(
    request: inference_pb2.EmbedRequest, tokenizer: Tokenizer | None, model: ServedModel
) -> CheckedTexts:
    """Raises FieldError."""
    default = model.default_pooling
    if default is None or model.encoder is None:
        raise FieldError("inputs", "the model generates text, and gives no embeddings")
    _check_priority(request.priority)
    if not 1 <= len(request.inputs) <= _MAX_INPUTS:
        raise FieldError("inputs", f"has {len(request.inputs)} entries, give 1 to {_MAX_INPUTS}")
    pooling = pooling_from_proto(request.pooling, default)
    most = model.encoder.max_prompt_len
    texts = await _texts(request, tokenizer, model.vocab_size, most)
    for index, token_ids in enumerate(texts):
        if not token_ids:
            raise FieldError(f"inputs[{index}]", "is empty; give a text, or at least one token id")
        if len(token_ids) > most:
            message = f"has {len(token_ids)} tokens, the model reads at most {most}; shorten it, or set truncate"
            raise FieldError(f"inputs[{index}]", message)
    return CheckedTexts(texts, pooling, request.priority)


def check_embeddings_fit(num_inputs: int, embedding_bytes: int, max_message_bytes: int) -> None:
    """Whether an answer with an embedding for each input can be sent. Raises FieldError."""
    if num_inputs * embedding_bytes > max_message_bytes:
        most = max_message_bytes // embedding_bytes
        together = f"together more than grpc.max_message_bytes ({max_message_bytes}); give at most {most}"
        raise FieldError("inputs", f"has {num_inputs} entries with embeddings of {embedding_bytes} bytes, {together}")


async def _texts(
    request: inference_pb2.EmbedRequest, tokenizer: Tokenizer | None, vocab_size: int, most: int
) -> list[tuple[int, ...]]:
    """The ids of all inputs, in their order, cut if that is asked for. None for an empty text."""
    max_len = most if request.truncate else None
    found = [tuple(entry.token_ids.ids[:max_len]) for entry in request.inputs]
    written = [index for index, entry in enumerate(request.inputs) if entry.WhichOneof("input") == "text"]
    for index, token_ids in enumerate(found):
        check_token_ids(f"inputs[{index}].token_ids.ids", token_ids, vocab_size)
    texts = [request.inputs[index].text for index in written]
    for index, text in zip(written, texts, strict=True):
        if len(text) > _MAX_TEXT_LEN:
            message = f"has {len(text)} characters, at most {_MAX_TEXT_LEN} are taken"
            raise FieldError(f"inputs[{index}].text", message)
    if texts:
        encoded = await _encode(require_tokenizer(f"inputs[{written[0]}].text", tokenizer), texts, max_len)
        for index, text, ids in zip(written, texts, encoded, strict=True):
            found[index] = tuple(ids) if text else ()
    return found


def check_resume(request: inference_pb2.GenerateRequest) -> tuple[str, int, int]:
    """The request to go on with, and how many tokens and characters of it were seen. Raises FieldError."""
    request_id = check_request_id(request.request_id)
    given = [field.name for field, _ in request.ListFields() if field.name not in ("request_id", "resume")]
    if given:
        raise FieldError(given[0], "must be unset with resume: the request was submitted with its own")
    return request_id, request.resume.num_tokens, request.resume.num_chars


def _check_priority(priority: int) -> None:
    if not -_MAX_PRIORITY <= priority <= _MAX_PRIORITY:
        raise FieldError("priority", f"{priority} is outside [{-_MAX_PRIORITY}, {_MAX_PRIORITY}]")


def check_request_id(request_id: str) -> str:
    """The id itself. Raises FieldError."""
    if not request_id:
        raise FieldError("request_id", "is empty")
    if len(request_id) > _MAX_REQUEST_ID_LEN or not (request_id.isascii() and request_id.isprintable()):
        raise FieldError("request_id", f"give at most {_MAX_REQUEST_ID_LEN} printable ASCII characters")
    return request_id


def check_token_ids(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raises FieldError with the first id outside of the vocabulary."""
    if token_ids and max(token_ids) >= vocab_size:
        first = next(token_id for token_id in token_ids if token_id >= vocab_size)
        raise FieldError(field, f"token id {first} is outside the vocabulary [0, {vocab_size})")


def require_tokenizer(field: str, tokenizer: Tokenizer | None) -> Tokenizer:
    """Raises FieldError if the model has no tokenizer."""
    if tokenizer is None:
        raise FieldError(field, "the model has no tokenizer; send token_ids and read token_ids")
    return tokenizer


async def tokenize(
    prompt: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, tokenizer: Tokenizer | None
) -> list[int]:
    """Ids of a text or of a conversation. Raises FieldError."""
    kind = prompt.WhichOneof("prompt")
    if kind == "text":
        return (await _encode(require_tokenizer("text", tokenizer), [prompt.text]))[0]
    if kind == "chat":
        return await _render_chat(require_tokenizer("chat", tokenizer), prompt.chat)
    raise FieldError("prompt", "is missing; set one of its fields")


async def _prompt_ids(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer | None, model: ServedModel
) -> tuple[int, ...]:
    field = request.WhichOneof("prompt") or "prompt"
    _check_prompt_size(request, model)
    if field == "token_ids":
        token_ids = tuple(request.token_ids.ids)
        check_token_ids("token_ids.ids", token_ids, model.vocab_size)
    else:
        token_ids = tuple(await tokenize(request, tokenizer))
    if not token_ids:
        raise FieldError(field, "the prompt is empty; give at least one token")
    _check_prompt_len(field, len(token_ids), model)
    return token_ids


def _check_prompt_size(request: inference_pb2.GenerateRequest, model: ServedModel) -> None:
    """Refuse what cannot fit before any work is done for it: a message may have millions of entries."""
    _check_prompt_len("token_ids", len(request.token_ids.ids), model)
    for field, count, most in (
        ("text", len(request.text), _MAX_TOKEN_LEN * _most_prompt_tokens(model)),
        ("chat.messages", len(request.chat.messages), _most_prompt_tokens(model)),
    ):
        if count > most:
            things = "characters" if field == "text" else "messages"
            raise FieldError(field, f"has {count} {things}, at most {most} can fit: {_limit(model)}")


def _check_prompt_len(field: str, prompt_len: int, model: ServedModel) -> None:
    most = _most_prompt_tokens(model)
    if prompt_len > most:
        limit = _limit(model) if model.encoder is None else f"the encoder reads at most {most}"
        message = f"the prompt has {prompt_len} tokens, but {limit}; shorten it by at least {prompt_len - most}"
        raise FieldError(field, message)


def _most_prompt_tokens(model: ServedModel) -> int:
    return model.max_request_len - 1 if model.encoder is None else model.encoder.max_prompt_len


async def _encode(tokenizer: Tokenizer, texts: Sequence[str], max_len: int | None = None) -> list[list[int]]:
    def encode() -> list[list[int]]:
        return [tokenizer.encode(text, max_len=max_len) for text in texts]

    if sum(map(len, texts)) < _LONG_TEXT_LEN:
        return encode()
    return await asyncio.to_thread(encode)


async def _render_chat(tokenizer: Tokenizer, chat: inference_pb2.ChatMessages) -> list[int]:
    if not chat.messages:
        raise FieldError("chat.messages", "is empty; give at least one message")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise FieldError(f"chat.messages[{index}].role", "is empty; give system, user or assistant")
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    try:
        return list(await asyncio.to_thread(tokenizer.apply_chat_template, messages))
    except ValueError as error:
        raise FieldError("chat", " ".join(str(error).split())) from None


def _limit(model: ServedModel) -> str:
    if model.num_kv_tokens < model.max_model_len:
        return f"the KV cache holds {model.num_kv_tokens} tokens"
    return f"the context window is {model.max_model_len}"


def _check_sampling_sizes(sampling: common_pb2.SamplingParameters, model: ServedModel) -> None:
    for name, limit in (
        ("stop", _MAX_STOPS),
        ("stop_token_ids", _MAX_STOP_TOKEN_IDS),
        ("logit_bias", _MAX_LOGIT_BIASES),
        ("choices", _MAX_CHOICES),
    ):
        count = len(getattr(sampling, name))
        if count > limit:
            raise FieldError(f"sampling.{name}", f"has {count} entries, at most {limit} are accepted")
    for index, stop in enumerate(sampling.stop):
        if not 1 <= len(stop) <= _MAX_STOP_LEN:
            raise FieldError(f"sampling.stop[{index}]", f"has {len(stop)} characters, give 1 to {_MAX_STOP_LEN}")
    check_token_ids("sampling.stop_token_ids", sampling.stop_token_ids, model.vocab_size)
    if len(sampling.forced.ids) > _MAX_FORCED_IDS:
        raise FieldError("sampling.forced.ids", f"has {len(sampling.forced.ids)} entries, at most {_MAX_FORCED_IDS}")
    check_token_ids("sampling.forced.ids", sampling.forced.ids, model.vocab_size)
    if sampling.num_beams > model.max_num_seqs:
        message = f"{sampling.num_beams} exceeds the {model.max_num_seqs} of engine.max_num_seqs"
        raise FieldError("sampling.num_beams", message)
    check_token_ids("sampling.logit_bias", list(sampling.logit_bias), model.vocab_size)
    for kind in CONSTRAINT_KINDS:
        count = sum(map(len, sampling.choices)) if kind == "choices" else len(getattr(sampling, kind))
        if count > _MAX_CONSTRAINT_LEN:
            raise FieldError(f"sampling.{kind}", f"has {count} characters, at most {_MAX_CONSTRAINT_LEN} are accepted")


def _sampling_params(
    sampling: common_pb2.SamplingParameters, prompt_ids: tuple[int, ...], model: ServedModel, default_seed: int
) -> SamplingParams:
    forced_ids = tuple(sampling.forced.ids) if sampling.HasField("forced") else None
    prompt_len = len(given_ids(prompt_ids, forced_ids, model.encoder))
    room = model.max_request_len - prompt_len
    if sampling.HasField("max_tokens") and sampling.max_tokens > room:
        raise FieldError(
            "sampling.max_tokens",
            f"the prompt has {prompt_len} tokens and max_tokens is {sampling.max_tokens}, but {_limit(model)}; "
            f"at most {room} can be generated",
        )
    if not sampling.HasField("max_tokens") and sampling.min_tokens > room:
        raise FieldError("sampling.min_tokens", f"{sampling.min_tokens} exceeds the {room} that can be generated")
    default_max_tokens = min(max(DEFAULT_MAX_TOKENS, sampling.min_tokens), room)
    try:
        return params_from_proto(sampling, default_seed=default_seed, default_max_tokens=default_max_tokens)
    except FieldError as error:
        raise FieldError(f"sampling.{error.field}", error.message) from None
