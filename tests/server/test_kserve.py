"""The open inference protocol over a real socket, with stub engines: refusals by name, ends that free their places."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from shardray.runtime.client import Client
from shardray.runtime.config import Config, GrpcAuthSettings, GrpcSettings, LimitsSettings, ModelSettings
from shardray.runtime.engine.request import FieldError
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.observe import extras
from shardray.runtime.observe.extras import MissingExtraError, check_extras
from shardray.runtime.server.kserve.requests import read_request
from shardray.runtime.server.kserve.sampling import fill_sampling
from shardray.runtime.server.merge import answer_all
from shardray.runtime.server.messages import params_from_proto
from shardray.v1 import common_pb2
from tests.serving import Serving, eventually, in_thread, serving

Tensor = tuple[str, list[Any]]  # datatype and values
KSERVE = GrpcSettings(listen="127.0.0.1:0", kserve=True)
_FIELDS = {"BYTES": "bytes_contents", "INT32": "int_contents", "BOOL": "bool_contents", "FP32": "fp32_contents"}


def infer_request(
    tensors: dict[str, Tensor] | None = None, request_id: str = "", model: str = "stub", **parameters: Any
) -> service_pb2.ModelInferRequest:
    """A prompt in typed contents, unless ``tensors`` says otherwise."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, (datatype, values) in {"text_input": ("BYTES", [b"abc"]), **(tensors or {})}.items():
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
        if datatype in _FIELDS:
            getattr(tensor.contents, _FIELDS[datatype]).extend(values)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def raw_request(*raws: bytes, datatype: str = "BYTES", shape: int = 1) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="stub", raw_input_contents=raws)
    request.inputs.add(name="text_input", datatype=datatype, shape=[shape])
    return request


@pytest.fixture(scope="module")
def up(tokenizer: Tokenizer) -> Iterator[Serving]:
    with in_thread(serving(tokenizer, grpc=KSERVE, step_time_s=0.01)) as up:
        yield up


@contextlib.asynccontextmanager
async def stub_of(up: Serving) -> AsyncIterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(up.address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def details_of(error: grpc.aio.AioRpcError) -> Iterator[Any]:
    for packed in rpc_status.from_call(error).details:
        for kind in (error_details_pb2.BadRequest, error_details_pb2.RetryInfo, error_details_pb2.ResourceInfo):
            if packed.Is(kind.DESCRIPTOR):
                one = kind()
                packed.Unpack(one)
                yield one


JSON = "sampling_parameters"
BAD: list[tuple[service_pb2.ModelInferRequest, str, str]] = [
    (service_pb2.ModelInferRequest(model_name="stub"), "text_input", "is missing"),
    (infer_request({"text_input": ("BYTES", [b""])}), "text_input", "the prompt is empty"),
    (infer_request({"text_input": ("BYTES", [b"a" * 600])}), "text_input", "the context window is 512"),
    (infer_request({"text_input": ("BYTES", [b"\xff"])}), "text_input", "is not UTF-8"),
    (infer_request({"text_input": ("BYTES", [b"a", b"b"])}), "text_input", "send a request for each prompt"),
    (infer_request({"text_input": ("INT32", [7])}), "text_input", "7 is no text"),
    (infer_request({"text_input": ("BF16", [])}), "text_input", "datatype 'BF16' is not known here"),
    (infer_request(max_tokens=0), "max_tokens", "0 is outside [1, "),
    (infer_request(max_tokens=-1), "max_tokens", "-1 is no whole number in [0, "),
    (infer_request(max_tokens=10**6), "max_tokens", "at most 509 can be generated"),
    (infer_request(max_tokens=2.5), "max_tokens", "2.5 is no whole number"),
    (infer_request(max_tokens="many"), "max_tokens", "'many' is no number"),
    (infer_request(temperature=float("nan")), "temperature", "nan is outside [0.0, 100.0]"),
    (infer_request({"temperature": ("FP32", [-1.0])}), "temperature", "-1.0 is outside"),
    (infer_request({"top_p": ("FP32", [0.5, 0.5])}), "top_p", "has 2 elements, give one"),
    (infer_request(ignore_eos=3), "ignore_eos", "3 is neither true nor false"),
    (infer_request(seed=float("inf")), "seed", "inf is no whole number"),
    (infer_request({"stop": ("BYTES", [b""])}), "stop[0]", "has 0 characters"),
    (infer_request({"beam_width": ("INT32", [40])}), "num_beams", "40 exceeds the 16 of engine.max_num_seqs"),
    (infer_request({"beam_width": ("INT32", [2])}, num_beams=2), "beam_width", "means the same as num_beams"),
    (infer_request({"beam_width": ("INT32", [2])}, len_penalty="x"), "len_penalty", "'x' is no number"),
    (infer_request(beam_width=2, len_penalty=11.0), "length_penalty", "11.0 is outside [-10.0, 10.0]"),
    (infer_request({"regex": ("BYTES", [b"("])}), "regex", "unclosed group"),
    (infer_request({"choices": ("BYTES", [b"a"])}, regex="b"), "choices", "cannot stand beside regex"),
    (infer_request({"bad_words": ("BYTES", [b"no"])}), "bad_words", "'no' is not done here"),
    (infer_request({"random_seed": ("INT32", [1])}, seed=2), "random_seed", "means the same as seed"),
    (infer_request(temprature=0.5), "temprature", "is not known here; beam_width, choices, early_stopping, end_id"),
    (infer_request(sequence_id=7), "sequence_id", "sequences are not kept here"),
    (infer_request(priority=200), "priority", "200 is outside [-100, 100]"),
    (infer_request(timeout=-5), "timeout", "-5 is no whole number"),
    (infer_request(stream=True), "stream", "call ModelStreamInfer"),
    (infer_request({JSON: ("BYTES", [b"{"])}), JSON, "is no JSON"),
    (infer_request({JSON: ("BYTES", [b"[1]"])}), JSON, "is no JSON object such as"),
    (infer_request({JSON: ("BYTES", [b"[" * 100_000])}), JSON, "is no JSON"),
    (infer_request({JSON: ("BYTES", [b'{"top_k": 1e400}'])}), "top_k", "inf is no whole number"),
    (infer_request({JSON: ("BYTES", [b'{"temperature": [1]}'])}), "temperature", "[1] is no number"),
    (infer_request({JSON: ("BYTES", [b'{"logit_bias": {"9": 1000}}'])}), "logit_bias[9]", "1000.0 is outside"),
    (infer_request(logit_bias="x"), "logit_bias", "'x' is no object"),
    (raw_request(), "text_input", "has 0 elements, and its shape [1] says otherwise"),
    (raw_request(b"\x01\x00\x00\x00a", b""), "raw_input_contents", "has 2 entries for 1 inputs"),
    (raw_request(b"\x05\x00\x00\x00a"), "text_input", "its bytes end within an element"),
    (raw_request(b"\x01\x00"), "text_input", "its bytes end within an element"),
    (raw_request(b"\x00" * 5, datatype="INT32"), "text_input", "has 5 bytes, no whole number of INT32"),
    (raw_request(b"\x00" * 4 * 2000, shape=2000), "text_input", "has more than 1024 elements"),
]


@pytest.mark.asyncio
async def test_each_bad_field_is_named_as_the_client_knows_it_and_the_server_goes_on(up: Serving) -> None:
    async with stub_of(up) as stub:
        for request, field, message in BAD:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
            assert message in caught.value.details()
            violations = [one.field_violations[0].field for one in details_of(caught.value)]
            assert violations == [field], caught.value.details()
        answer = await stub.ModelInfer(infer_request(max_tokens=4))
        assert list(answer.outputs[0].contents.bytes_contents) == [b"abca"], "typed, as it was asked"
    with Client(up.address) as client:
        assert client.generate("abc", max_tokens=3).text == "abc"


def test_beams_are_those_of_a_search_and_what_is_sent_with_one_of_them_has_no_effect() -> None:
    found, single = common_pb2.SamplingParameters(), common_pb2.SamplingParameters()
    fill_sampling(found, {"early_stopping": True, "len_penalty": "0.6", "beam_width": 4, "temperature": 0.0})
    assert (found.num_beams, found.length_penalty, found.early_stopping) == (4, 0.6, True)
    assert params_from_proto(found).num_beams == 4
    fill_sampling(single, {"beam_width": 1, "len_penalty": 2.0, "early_stopping": 7})
    assert params_from_proto(single).num_beams == 1


def test_a_schema_is_an_object_or_the_text_of_one() -> None:
    for schema in ({"type": "integer"}, '{"type": "integer"}'):
        found = common_pb2.SamplingParameters()
        fill_sampling(found, {"json_schema": schema})
        assert found.json_schema == '{"type": "integer"}'
    found = common_pb2.SamplingParameters()
    fill_sampling(found, {"choices": ["a", "b"]})
    assert params_from_proto(found).choices == ("a", "b")


@pytest.mark.asyncio
async def test_unknown_models_and_outputs_and_methods_left_out_are_refused(up: Serving) -> None:
    async with stub_of(up) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="model 'other' is not served here; stub is") as caught:
            await stub.ModelInfer(infer_request(model="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert [one.resource_name for one in details_of(caught.value)] == ["other"]
        with pytest.raises(grpc.aio.AioRpcError, match="'stub:9' is not served"):
            await stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="stub", version="9"))
        request = infer_request()
        request.outputs.add(name="logits")
        with pytest.raises(grpc.aio.AioRpcError, match="'logits' is not known here; text_output,"):
            await stub.ModelInfer(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelStatistics(service_pb2.ModelStatisticsRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_within_a_stream_a_refusal_is_a_message_and_the_other_requests_go_on(up: Serving) -> None:
    async with stub_of(up) as stub:
        requests = [infer_request(request_id="good", max_tokens=9, stream=True), infer_request(request_id="bad", n=2)]
        answers = [answer async for answer in stub.ModelStreamInfer(iter(requests))]
        refusals = [answer for answer in answers if answer.error_message]
        assert [(one.infer_response.id, one.error_message) for one in refusals] == [
            ("bad", "[INVALID_ARGUMENT] n: 2 is not done here; leave it out, or give 1")
        ]
        texts = [one.infer_response.outputs[0].contents.bytes_contents[0] for one in answers if not one.error_message]
        assert (b"".join(texts), len(texts) > 5) == (b"abcabcabc", True)


@pytest.mark.asyncio
async def test_a_client_that_asks_for_statuses_gets_them_and_its_call_ends(up: Serving) -> None:
    async with stub_of(up) as stub:
        requests = [infer_request(max_tokens=400, stream=True), infer_request(n=2)]
        call = stub.ModelStreamInfer(iter(requests), metadata=(("triton_grpc_error", "true"),))
        with pytest.raises(grpc.aio.AioRpcError, match="n: 2 is not done here") as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await nothing_is_left(up)


@pytest.mark.asyncio
async def test_bytes_that_are_no_message_are_refused_in_a_stream_as_well(up: Serving) -> None:
    no_utf8 = b"\x0a\x02\xff\xff"  # the first field is the model's name
    async with grpc.aio.insecure_channel(up.address) as channel:
        for data, message in ((no_utf8, "model_name: is not UTF-8"), (b"\xff" * 9, "are not a message of this method")):
            with pytest.raises(grpc.aio.AioRpcError, match=message):
                await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data)
            with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
                async for _ in channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([data])):
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def nothing_is_left(up: Serving) -> None:
    def idle() -> bool:
        fleet = up.driver.fleet.snapshot()
        return fleet.num_live_requests == 0 and fleet.replicas[0].stats.num_running == 0

    await eventually(idle)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["stream", "unary"])
async def test_a_cancelled_call_frees_all_of_its_requests(kind: str, up: Serving) -> None:
    async with stub_of(up) as stub:
        num_before = up.driver.fleet.snapshot().replicas[0].stats.num_output_tokens
        requests = [infer_request(max_tokens=500, ignore_eos=True, stream=kind == "stream") for _ in range(3)]
        if kind == "stream":
            call = stub.ModelStreamInfer(iter(requests))
            await call.read()
        else:
            call = stub.ModelInfer(requests[0])
        await eventually(lambda: up.driver.fleet.snapshot().num_live_requests == (3 if kind == "stream" else 1))
        call.cancel()
        await nothing_is_left(up)
        assert up.driver.fleet.snapshot().replicas[0].stats.num_output_tokens - num_before < 500


@pytest.mark.asyncio
async def test_deadlines_of_a_request_and_full_queues_end_it_as_they_end_our_own(tokenizer: Tokenizer) -> None:
    limits = LimitsSettings(max_queued_requests=1)
    async with (
        serving(tokenizer, grpc=KSERVE, limits=limits, max_num_seqs=1, step_time_s=0.05) as up,
        stub_of(up) as stub,
    ):
        slow = [stub.ModelInfer(infer_request(max_tokens=400, timeout=700_000)) for _ in range(3)]
        await eventually(lambda: up.driver.fleet.snapshot().num_queued_requests == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(infer_request())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [type(one).__name__ for one in details_of(caught.value)] == ["RetryInfo"]
        for call in slow:
            with pytest.raises(grpc.aio.AioRpcError, match=r"within its deadline of 0\.7 s"):
                await call


@pytest.mark.asyncio
async def test_a_token_with_the_inference_role_opens_it_and_nothing_else_does(
    tokenizer: Tokenizer, tmp_path: Any
) -> None:
    (tmp_path / "tokens").write_text("ci inference token-of-ci-00001\nops control token-of-ops-0001\n")
    (tmp_path / "tokens").chmod(0o600)
    guarded = GrpcSettings(listen="127.0.0.1:0", kserve=True, auth=GrpcAuthSettings(tokens=str(tmp_path / "tokens")))
    codes = {"": "UNAUTHENTICATED", "token-of-ops-0001": "PERMISSION_DENIED", "token-of-ci-00001": "OK"}
    async with serving(tokenizer, grpc=guarded) as up, stub_of(up) as stub:
        for token, expected in codes.items():
            metadata = (("authorization", f"Bearer {token}"),)
            request = infer_request(max_tokens=3)
            for call in (stub.ModelInfer(request, metadata=metadata), _drained(stub, request, metadata)):
                try:
                    await call
                    code = "OK"
                except grpc.aio.AioRpcError as error:
                    code = error.code().name
                assert code == expected


async def _drained(stub: Any, request: service_pb2.ModelInferRequest, metadata: tuple[tuple[str, str]]) -> None:
    async for answer in stub.ModelStreamInfer(iter([request]), metadata=metadata):
        assert not answer.error_message


@pytest.mark.asyncio
async def test_without_the_setting_it_is_not_there(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=0) as up, stub_of(up) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ServerLive(service_pb2.ServerLiveRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_setting_without_the_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    config = Config(model=ModelSettings(source="stub"), grpc=GrpcSettings(kserve=True))
    with pytest.raises(MissingExtraError) as caught:
        check_extras(config)
    assert str(caught.value) == (
        "grpc.kserve: true needs the package tritonclient, which is not installed; "
        "pip install 'shardray[kserve]', or set it to false"
    )


@pytest.mark.asyncio
async def test_a_reader_that_waits_holds_the_answers_up_and_no_more_are_begun_than_allowed() -> None:
    made: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        for number in range(5):
            yield number

    async def answer(number: int) -> Any:
        for _ in range(100):
            made.append(number)
            yield number

    answers = answer_all(numbers(), answer, 2)
    await anext(answers)
    await asyncio.sleep(0.01)
    assert set(made) <= {0, 1}
    assert len(made) < 8
    assert len([one async for one in answers]) == 499


_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["1", "-1", "nan"]),
)
_NAMES = st.one_of(
    st.text(max_size=5), st.sampled_from([*common_pb2.SamplingParameters.DESCRIPTOR.fields_by_name, "stream", "n"])
)


@settings(max_examples=200)
@given(
    parameters=st.dictionaries(_NAMES, _VALUES, max_size=4),
    json_text=st.one_of(
        st.binary(max_size=9), st.dictionaries(_NAMES, _VALUES).map(lambda one: json.dumps(one).encode())
    ),
    raw=st.binary(max_size=12),
    datatype=st.sampled_from(["BYTES", "BOOL", "INT32", "FP16", "FP64", "UINT8", ""]),
)
def test_whatever_is_sent_is_read_or_named(parameters: Any, json_text: bytes, raw: bytes, datatype: str) -> None:
    raws = [(3).to_bytes(4, "little") + b"abc", len(json_text).to_bytes(4, "little") + json_text, raw]
    request = infer_request(**parameters)
    del request.inputs[:]
    request.raw_input_contents.extend(raws)
    for name, kind in (("text_input", "BYTES"), (JSON, "BYTES"), ("top_k", datatype)):
        request.inputs.add(name=name, datatype=kind, shape=[1])
    with contextlib.suppress(FieldError):
        assert read_request(request).generation.text == "abc"
