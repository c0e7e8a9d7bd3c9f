"""Every bad field, over real gRPC: its code, its name, its details; a stream beside them does not feel it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from shardray.runtime.client import Delta
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.v1 import common_pb2, control_pb2, inference_pb2
from tests.server.test_bad_requests import BAD, chat, ids
from tests.serving import Serving, serving
from tests.stub_operator import StubOperator

pytestmark = pytest.mark.asyncio(loop_scope="module")
_GENERATE = "InferenceService/Generate"
_BESIDE = "beside"
_Request = inference_pb2.GenerateRequest


@dataclass
class Beside:
    """A server, and a request that runs on it all the time."""

    up: Serving
    channel: grpc.aio.Channel
    deltas: asyncio.Task[list[Delta]]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def beside(tokenizer: Tokenizer) -> AsyncIterator[Beside]:
    """The model of the table in test_bad_requests.py: 300 ids, a context window of 100."""
    stub = {"step_time_s": 0.03, "max_model_len": 100, "num_kv_tokens": 1000}
    async with serving(tokenizer, operator=StubOperator, **stub) as up:
        stream = up.client.stream("abc", max_tokens=97, ignore_eos=True, request_id=_BESIDE, resumable_s=0)
        first = await anext(stream)

        async def rest() -> list[Delta]:
            return [first, *[delta async for delta in stream]]

        async with grpc.aio.insecure_channel(up.address) as channel:
            yield Beside(up, channel, asyncio.create_task(rest()))


async def refused(beside: Beside, method: str, data: bytes) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The code of a call that has to fail, and its details."""
    call = beside.channel.unary_stream(f"/shardray.v1.{method}")(data, timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    details: Any = dict(caught.value.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    return caught.value.code(), status_pb2.Status.FromString(details)


def detail(status: status_pb2.Status, kind: type[Message]) -> Any:
    """The one detail of this kind."""
    [found] = [packed for packed in status.details if packed.Is(kind.DESCRIPTOR)]
    unpacked = kind()
    found.Unpack(unpacked)
    return unpacked


def resume(request_id: str, **fields: Any) -> _Request:
    return _Request(request_id=request_id, resume=inference_pb2.ResumePoint(**fields))


_Scale, _Drain, _Reload = control_pb2.ScaleRequest, control_pb2.DrainRequest, control_pb2.ReloadRequest
_Tokenize, _Abort = inference_pb2.TokenizeRequest, inference_pb2.AbortRequest
_forced = common_pb2.TokenIds
MESSAGES: list[tuple[str, str, Message]] = [
    *((_GENERATE, field, request) for field, request, _ in BAD),
    (_GENERATE, "text", _Request(text="a" * 30_000)),
    (_GENERATE, "text", _Request(text="word " * 200)),
    (_GENERATE, "chat.messages", chat(*[("user", "x")] * 200)),
    (_GENERATE, "chat", chat(("user", "word " * 200))),
    (_GENERATE, "resumable_s", _Request(text="a", resumable_s=math.nan)),
    (_GENERATE, "resumable_s", _Request(text="a", resumable_s=-1)),
    (_GENERATE, "resumable_s", _Request(text="a", resumable_s=math.inf)),
    (_GENERATE, "priority", _Request(text="a", priority=-(2**31))),
    (_GENERATE, "request_id", resume("")),
    (_GENERATE, "resume", resume(_BESIDE)),
    (_GENERATE, "text", _Request(text="a", request_id="x", resume=inference_pb2.ResumePoint())),
    (_GENERATE, "sampling.forced.ids", _Request(text="a", sampling={"forced": _forced(ids=[300])})),
    (_GENERATE, "sampling.forced.ids", _Request(text="a", sampling={"forced": _forced(ids=[1] * 129)})),
    (_GENERATE, "sampling.logit_bias[5]", _Request(text="a", sampling={"logit_bias": {5: -math.inf}})),
    (_GENERATE, "sampling.logprobs", _Request(text="a", sampling={"logprobs": 2**32 - 1})),
    ("InferenceService/Embed", "inputs", inference_pb2.EmbedRequest()),
    ("InferenceService/Tokenize", "prompt", _Tokenize()),
    ("InferenceService/Tokenize", "chat.messages", _Tokenize(chat=inference_pb2.ChatMessages())),
    ("InferenceService/Detokenize", "token_ids", inference_pb2.DetokenizeRequest(token_ids=[2**32 - 1])),
    ("InferenceService/Abort", "request_id", _Abort()),
    ("InferenceService/Abort", "request_id", _Abort(request_id="two\nlines")),
    ("ControlService/WatchFleet", "min_interval_ms", control_pb2.WatchFleetRequest(min_interval_ms=60_001)),
    ("ControlService/Scale", "replicas", _Scale()),
    ("ControlService/Scale", "replicas", _Scale(replicas=0)),
    ("ControlService/Scale", "tensor_parallel_size", _Scale(tensor_parallel_size=2**32 - 1)),
    ("ControlService/Scale", "tensor_split", _Scale(tensor_parallel_size=2, tensor_split=[1.0])),
    ("ControlService/Scale", "tensor_split[1]", _Scale(tensor_parallel_size=2, tensor_split=[1.0, math.nan])),
    ("ControlService/Scale", "stage_layers[0]", _Scale(pipeline_parallel_size=1, stage_layers=[0])),
    ("ControlService/Reload", "source", _Reload()),
    ("ControlService/Reload", "source", _Reload(source="a\0b")),
    ("ControlService/Reload", "source", _Reload(source="a" * 5000)),
    ("ControlService/Drain", "timeout_s", _Drain(timeout_s=math.nan)),
    ("ControlService/Drain", "timeout_s", _Drain(timeout_s=-1)),
    ("ControlService/Drain", "timeout_s", _Drain(timeout_s=1e300)),
]
_NO_UTF8 = b"\xff\xfe"


def spoiled(request: Message) -> bytes:
    """The request with its word ``spoil`` made into what is not UTF-8."""
    data = request.SerializeToString()
    assert b"sp" in data
    return data.replace(b"sp", _NO_UTF8)


BYTES: list[tuple[str, str, bytes]] = [
    (_GENERATE, "text", spoiled(_Request(text="sp"))),
    (_GENERATE, "request_id", spoiled(_Request(text="a", request_id="sp"))),
    (_GENERATE, "sampling.stop", spoiled(_Request(text="a", sampling={"stop": ["a", "sp"]}))),
    (_GENERATE, "chat.messages.content", spoiled(chat(("user", "a"), ("user", "sp")))),
    ("InferenceService/Tokenize", "text", spoiled(_Tokenize(text="sp"))),
    ("InferenceService/Abort", "request_id", spoiled(_Abort(request_id="sp"))),
    ("ControlService/Reload", "source", spoiled(_Reload(source="sp"))),
    (_GENERATE, "request", b"\x12\xff"),  # longer than it is
    (_GENERATE, "request", ids(1).SerializeToString() + b"\xfb\x7f\x01"),  # a group that does not end
    ("ControlService/Scale", "request", b"\x0a"),
]
TABLE = [*((method, field, message.SerializeToString()) for method, field, message in MESSAGES), *BYTES]


@pytest.mark.parametrize(
    ("method", "field", "data"), TABLE, ids=[f"{number}-{row[0]}-{row[1]}" for number, row in enumerate(TABLE)]
)
async def test_a_bad_field_is_named_over_the_wire(beside: Beside, method: str, field: str, data: bytes) -> None:
    code, status = await refused(beside, method, data)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = detail(status, error_details_pb2.BadRequest).field_violations
    assert violation.field == field
    assert violation.description
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("shardray", "BAD_FIELD")


async def test_a_request_that_is_not_there_and_one_that_is_are_named_as_resources(beside: Beside) -> None:
    expected = {
        "nobody": (resume("nobody"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST"),
        _BESIDE: (_Request(text="a", request_id=_BESIDE), grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE"),
    }
    for request_id, (request, expected_code, reason) in expected.items():
        code, status = await refused(beside, _GENERATE, request.SerializeToString())
        assert (code, detail(status, error_details_pb2.ErrorInfo).reason) == (expected_code, reason)
        resource = detail(status, error_details_pb2.ResourceInfo)
        assert (resource.resource_type, resource.resource_name) == ("shardray.v1.GenerateRequest", request_id)


@pytest.mark.parametrize(
    ("method", "data", "expected"),
    [
        (_GENERATE, _Request(text="a" * 5_000_000).SerializeToString(), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("InferenceService/Degenerate", b"", grpc.StatusCode.UNIMPLEMENTED),
        ("NoService/Generate", b"", grpc.StatusCode.UNIMPLEMENTED),
        ("ReplicaService/Connect", b"", grpc.StatusCode.UNIMPLEMENTED),
        ("", b"", grpc.StatusCode.UNIMPLEMENTED),
    ],
    ids=["too-large", "no-method", "no-service", "inner-service", "nothing"],
)
async def test_what_grpc_itself_refuses_has_its_code(
    beside: Beside, method: str, data: bytes, expected: grpc.StatusCode
) -> None:
    code, _ = await refused(beside, method, data)
    assert code is expected


async def test_after_all_this_others_are_served_and_the_stream_beside_felt_nothing(
    beside: Beside, tokenizer: Tokenizer
) -> None:
    assert (await beside.up.client.generate("xyz", max_tokens=3)).text == "xyz"
    deltas = await beside.deltas
    prompt = tokenizer.encode("abc")
    assert [token_id for delta in deltas for token_id in delta.token_ids] == (prompt * 33)[:97]
    assert beside.up.driver.fleet.snapshot().num_live_requests == 0
