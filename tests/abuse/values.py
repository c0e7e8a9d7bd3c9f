"""Messages that are well-formed protobuf and mean harm: every field at and beyond its edges, alone and together."""

from __future__ import annotations

import math
from collections.abc import Callable

import grpc
from hypothesis import strategies as st

from shardray.runtime.client.channel import channel_options
from shardray.v1 import common_pb2, control_pb2, inference_pb2

_PREFIX = "/shardray.v1."
GENERATE = "InferenceService/Generate"
_TIMEOUT_S = 0.5  # of a call that is taken
# What a client may be told. Not among them: UNKNOWN, and INTERNAL with an error that nobody foresaw.
FORESEEN = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.CANCELLED,
}
_doubles = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, 5e-324, 1.8e308, -1.8e308, 100.0, 100.1]),
    st.floats(),
)
_uint32 = st.one_of(st.sampled_from([0, 1, 2, 258, 259, 1024, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
_uint64 = st.integers(0, 2**64 - 1)
_texts = st.one_of(
    st.text(max_size=50), st.sampled_from(["", "\0", "\ufeff", "a" * 300, "\U0010ffff" * 40, "{{ 7*7 }}"])
)
_schemas = st.sampled_from(["", "{}", "true", "[", '{"type": "object"}', '{"enum": []}', '{"anyOf":[' * 500])
_sampling = st.builds(
    common_pb2.SamplingParameters,
    temperature=st.none() | _doubles,
    top_k=_uint32,
    top_p=st.none() | _doubles,
    min_p=_doubles,
    repetition_penalty=st.none() | _doubles,
    presence_penalty=_doubles,
    frequency_penalty=_doubles,
    logit_bias=st.dictionaries(_uint32, _doubles, max_size=5),
    seed=st.none() | _uint64,
    max_tokens=st.none() | _uint32,
    min_tokens=_uint32,
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(_uint32, max_size=5),
    stop=st.lists(_texts, max_size=4),
    logprobs=st.none() | _uint32,
    num_beams=st.none() | _uint32,
    length_penalty=st.none() | _doubles,
    early_stopping=st.booleans(),
    json_schema=st.none() | _schemas,
    regex=st.none() | _texts,
    grammar=st.none() | _texts,
    choices=st.lists(_texts, max_size=4),
)
_mild_sampling = st.builds(
    common_pb2.SamplingParameters,
    temperature=st.none() | st.sampled_from([0.0, 1e-300, 1e-10, 100.0]),
    top_k=_uint32,
    top_p=st.none() | st.sampled_from([5e-324, 1e-9, 1.0]),
    min_p=st.sampled_from([0.0, 1.0, 5e-324]),
    repetition_penalty=st.none() | st.sampled_from([5e-324, 1e-30, 100.0]),
    presence_penalty=st.sampled_from([-100.0, 100.0]),
    frequency_penalty=st.sampled_from([-100.0, 100.0]),
    logit_bias=st.dictionaries(st.integers(0, 258), st.sampled_from([-100.0, 100.0]), max_size=258),
    seed=st.none() | _uint64,
    max_tokens=st.integers(1, 40),
    min_tokens=st.integers(0, 40),
    stop_token_ids=st.lists(st.integers(0, 258), max_size=128),
    stop=st.lists(st.text(min_size=1, max_size=8), max_size=16),
    logprobs=st.none() | st.integers(0, 20),
)
_mild_search = st.builds(
    common_pb2.SamplingParameters,
    repetition_penalty=st.none() | st.sampled_from([5e-324, 1e-30, 100.0]),
    presence_penalty=st.sampled_from([-100.0, 100.0]),
    logit_bias=st.dictionaries(st.integers(0, 258), st.sampled_from([-100.0, 100.0]), max_size=258),
    max_tokens=st.integers(1, 40),
    min_tokens=st.integers(0, 40),
    stop_token_ids=st.lists(st.integers(0, 258), max_size=128),
    num_beams=st.integers(2, 4),
    length_penalty=st.sampled_from([-10.0, 0.0, 10.0]),
    early_stopping=st.booleans(),
)
_mild_constraint = st.one_of(
    st.builds(
        common_pb2.SamplingParameters,
        json_schema=st.sampled_from(["{}", '{"type": "object"}', '{"type": "string", "minLength": 1000000}']),
        max_tokens=st.integers(1, 40),
        logit_bias=st.dictionaries(st.integers(0, 258), st.sampled_from([-100.0, 100.0]), max_size=258),
    ),
    st.builds(
        common_pb2.SamplingParameters,
        regex=st.sampled_from(
            ["(a|b)*a(a|b){18}", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}", r"\PC*", "é*", "a*"]
        ),
        temperature=st.none() | st.sampled_from([0.0, 100.0]),
        max_tokens=st.integers(1, 40),
    ),
    st.builds(
        common_pb2.SamplingParameters,
        choices=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=20),
        stop=st.lists(st.text(min_size=1, max_size=2), max_size=2),
        logprobs=st.none() | st.integers(0, 20),
    ),
    st.builds(
        common_pb2.SamplingParameters,
        grammar=st.sampled_from(['start: "a" start "b" |', "start: A B*\nA: /[a-z]+/\nB: /[a-m]+/", "root ::= root"]),
        repetition_penalty=st.sampled_from([1e-30, 100.0]),
        max_tokens=st.integers(1, 40),
    ),
)
_chat = st.builds(
    inference_pb2.ChatMessages,
    messages=st.lists(st.builds(inference_pb2.ChatMessage, role=_texts, content=_texts), max_size=5),
)
_prompts = st.one_of(
    st.builds(dict, text=_texts),
    st.builds(dict, token_ids=st.builds(common_pb2.TokenIds, ids=st.lists(_uint32, max_size=20))),
    st.builds(dict, token_ids=st.builds(common_pb2.TokenIds, ids=st.lists(st.integers(0, 258), min_size=1))),
    st.builds(dict, chat=_chat),
    st.just({}),
)
_resumes = st.none() | st.builds(inference_pb2.ResumePoint, num_tokens=_uint32, num_chars=_uint32)


def _generate(
    prompt: dict[str, object], sampling: common_pb2.SamplingParameters, **fields: object
) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(sampling=sampling, **prompt, **fields)  # type: ignore[arg-type]


_generates = st.builds(
    _generate,
    _prompts,
    st.one_of(_sampling, _mild_sampling, _mild_search, _mild_constraint),
    request_id=st.one_of(st.just(""), _texts),
    priority=st.one_of(st.integers(-100, 100), st.integers(-(2**31), 2**31 - 1)),
    resumable_s=st.one_of(st.just(0.0), _doubles),
    resume=_resumes,
)
_valid_generates = st.builds(
    _generate,
    st.builds(dict, token_ids=st.builds(common_pb2.TokenIds, ids=st.lists(st.integers(0, 258), min_size=1))),
    st.one_of(_mild_sampling, _mild_search, _mild_constraint),
)
_embeds = st.builds(
    inference_pb2.EmbedRequest,
    inputs=st.lists(st.builds(inference_pb2.EmbedInput, text=_texts), max_size=3),
    truncate=st.booleans(),
    priority=st.integers(-(2**31), 2**31 - 1),
)
_messages = st.one_of(
    st.tuples(st.just("InferenceService/Embed"), _embeds),
    st.tuples(st.just(GENERATE), st.one_of(_generates, _valid_generates)),
    st.tuples(
        st.just("InferenceService/Tokenize"),
        st.builds(
            lambda prompt: inference_pb2.TokenizeRequest(**prompt),
            st.builds(dict, text=_texts) | st.builds(dict, chat=_chat),
        ),
    ),
    st.tuples(
        st.just("InferenceService/Detokenize"),
        st.builds(inference_pb2.DetokenizeRequest, token_ids=st.lists(_uint32 | st.integers(0, 258))),
    ),
    st.tuples(st.just("InferenceService/Abort"), st.builds(inference_pb2.AbortRequest, request_id=_texts)),
    st.tuples(st.just("ControlService/WatchFleet"), st.builds(control_pb2.WatchFleetRequest, min_interval_ms=_uint32)),
)
# A number far above any that is in use, as varint, fixed64, bytes and a group that is never closed.
_unknown = st.sampled_from(
    [b"", b"\xf8\x7f\x01", b"\xf9\x7f" + bytes(8), b"\xfa\x7f\x03abc", b"\xfb\x7f", b"\xfb\x7f" * 200]
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, bytes]:
    """A method and the bytes of its request: a message, at times with unknown fields, cut, or with a byte changed."""
    method, request = draw(_messages)
    data = bytearray(request.SerializeToString() + draw(_unknown))
    match draw(st.integers(0, 9)):
        case 8 if data:
            del data[draw(st.integers(0, len(data) - 1)) :]
        case 9 if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return method, bytes(data)


_MANY = 3_900_000
_one = common_pb2.TokenIds(ids=[1])
_Sampling, _Request = common_pb2.SamplingParameters, inference_pb2.GenerateRequest
# Messages just below what the server takes, 4 MiB, by the field that is so large.
HUGE: dict[str, Callable[[], inference_pb2.GenerateRequest]] = {
    "token_ids": lambda: _Request(token_ids=common_pb2.TokenIds(ids=[1] * _MANY)),
    "text": lambda: _Request(text="ab " * (_MANY // 3)),
    "sampling.stop": lambda: _Request(token_ids=_one, sampling=_Sampling(stop=["x"] * (_MANY // 3))),
    "sampling.stop_token_ids": lambda: _Request(token_ids=_one, sampling=_Sampling(stop_token_ids=[1] * _MANY)),
    "sampling.logit_bias": lambda: _Request(
        token_ids=_one, sampling=_Sampling(logit_bias=dict.fromkeys(range(_MANY // 16), 1.0))
    ),
    "sampling.json_schema": lambda: _Request(token_ids=_one, sampling=_Sampling(json_schema="[" * _MANY)),
    "sampling.choices": lambda: _Request(token_ids=_one, sampling=_Sampling(choices=["x"] * (_MANY // 4))),
    "chat.messages": lambda: _Request(chat=inference_pb2.ChatMessages(messages=[_turn] * (_MANY // 6))),
    "request_id": lambda: _Request(token_ids=_one, request_id="x" * _MANY),
}
_turn = inference_pb2.ChatMessage(role="u", content="")


def failure(channel: grpc.Channel, method: str, data: bytes, timeout_s: float = _TIMEOUT_S) -> grpc.RpcError | None:
    """How the call failed, if it did; one that streams for long is ended by its deadline."""
    call = channel.unary_stream(_PREFIX + method)(data, timeout=timeout_s)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error
    return None


def ask(channel: grpc.Channel, method: str, data: bytes, timeout_s: float = _TIMEOUT_S) -> tuple[grpc.StatusCode, str]:
    """How the call ended: code and details."""
    error = failure(channel, method, data, timeout_s)
    return (grpc.StatusCode.OK, "") if error is None else (error.code(), error.details() or "")  # type: ignore[attr-defined]


def connect(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=channel_options(address))
