"""vllm.grpc.engine.VllmEngine over a real socket, by the stubs of its package."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import tokenizers
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from shardray.runtime.config import Config, GatewaySettings, LimitsSettings, ModelSettings
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.observe.observation import Observation
from tests.serving import Serving, eventually, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
STEP_TIME_S = 0.005
ENDLESS = 400  # tokens: two seconds


@dataclass
class Up:
    """A fleet, and a stub for its port for gateways."""

    serving: Serving
    engine: Any
    channel: grpc.aio.Channel
    observation: Observation

    async def generate(self, request: vllm.GenerateRequest) -> list[vllm.GenerateResponse]:
        return [response async for response in self.engine.Generate(request)]

    async def is_idle(self) -> None:
        await eventually(lambda: self.serving.driver.fleet.snapshot().num_live_requests == 0, timeout_s=1.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tokenizer: Tokenizer) -> AsyncIterator[Up]:
    observation = Observation(Config(model=ModelSettings(source="stub")))
    gateway = GatewaySettings(listen="127.0.0.1:0", model_name="parrot")
    limits = LimitsSettings(max_queued_requests=1)
    async with serving(
        tokenizer, limits=limits, max_num_seqs=4, observation=observation, gateway=gateway, step_time_s=STEP_TIME_S
    ) as one:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{one.server.gateway_port}") as channel:
            yield Up(one, vllm_engine_pb2_grpc.VllmEngineStub(channel), channel, observation)


def request(text: str = "abc", stream: bool = True, request_id: str = "", **sampling: Any) -> vllm.GenerateRequest:
    """As smg sends it: ids of the prompt, and every number that cannot be absent."""
    made = vllm.GenerateRequest(request_id=request_id, stream=stream)
    made.tokenized.input_ids.extend(ids(text))
    defaults = {"top_p": 1.0, "repetition_penalty": 1.0, "n": 1, "skip_special_tokens": True}
    made.sampling_params.CopyFrom(vllm.SamplingParams(**{"max_tokens": 6, **defaults, **sampling}))
    return made


def ids(text: str) -> list[int]:
    return [_ALPHABET.index(letter) for letter in text]


_ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


async def refused(call: Any) -> tuple[str, str]:
    """Code, and the field that is named in the details."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status, details = rpc_status.from_call(caught.value), error_details_pb2.BadRequest()
    found = [one for one in (status.details if status else []) if one.Unpack(details)]
    return caught.value.code().name, details.field_violations[0].field if found else ""


async def test_a_stream_has_a_chunk_for_each_delta_and_the_end_in_a_message_of_its_own(up: Up) -> None:
    *chunks, last = await up.generate(request("abcd", max_tokens=6))
    assert [token_id for one in chunks for token_id in one.chunk.token_ids] == ids("abcdab")
    assert len(chunks) > 2  # what comes while a client does not read is merged
    assert all(
        (one.chunk.prompt_tokens, one.chunk.completion_tokens) == (4, len(one.chunk.token_ids)) for one in chunks
    )
    end = last.complete
    assert (end.finish_reason, end.prompt_tokens, end.completion_tokens, end.output_ids) == ("length", 4, 6, [])


async def test_without_a_stream_one_message_has_all_tokens_and_logprobs(up: Up) -> None:
    (only,) = await up.generate(request("ab", stream=False, max_tokens=3, logprobs=2))
    a, b = ids("ab")
    assert only.complete.output_ids == [a, b, a]
    logprobs = only.complete.output_logprobs
    assert (logprobs.token_ids, logprobs.token_logprobs) == ([a, b, a], [-0.5, -0.5, -0.5])
    assert [list(top.token_ids) for top in logprobs.top_logprobs] == [[a, a + 1], [b, b + 1], [a, a + 1]]
    assert list(logprobs.top_logprobs[0].values) == [-0.5, -1.5]


async def test_logprobs_stream_beside_their_tokens(up: Up) -> None:
    *chunks, last = await up.generate(request("ab", max_tokens=2, logprobs=0))
    assert [token_id for one in chunks for token_id in one.chunk.output_logprobs.token_ids] == ids("ab")
    assert not last.complete.HasField("output_logprobs")


async def test_stop_strings_and_stop_ids_end_the_output(up: Up) -> None:
    (by_text,) = await up.generate(request("abcd", stream=False, max_tokens=50, stop=["bc"]))
    assert (by_text.complete.finish_reason, by_text.complete.output_ids) == ("stop", ids("abc"))
    (by_id,) = await up.generate(request("abcd", stream=False, max_tokens=50, stop_token_ids=ids("c")))
    assert (by_id.complete.finish_reason, by_id.complete.output_ids) == ("stop", ids("abc"))
    assert by_id.complete.matched_token_id == ids("c")[0]


async def test_an_unset_max_tokens_is_what_the_context_window_leaves(up: Up) -> None:
    (only,) = await up.generate(_without_max_tokens("x" * 500))
    assert (only.complete.finish_reason, only.complete.completion_tokens) == ("length", 512 - 500)


def _without_max_tokens(text: str) -> vllm.GenerateRequest:
    made = request(text, stream=False)
    made.sampling_params.ClearField("max_tokens")
    return made


async def test_several_choices_stream_side_by_side_and_each_ends(up: Up) -> None:
    responses = await up.generate(request("abc", n=3, max_tokens=4))
    for index in range(3):
        chunks = [one.chunk for one in responses if one.HasField("chunk") and one.chunk.index == index]
        mine = [token_id for chunk in chunks for token_id in chunk.token_ids]
        assert mine == ids("abca")
    ends = [one.complete for one in responses if one.HasField("complete")]
    assert sorted((end.index, end.finish_reason, end.completion_tokens) for end in ends) == [
        (index, "length", 4) for index in range(3)
    ]
    first_end = next(number for number, one in enumerate(responses) if one.HasField("complete"))
    assert len({one.chunk.index for one in responses[:first_end]}) == 3, "they came one after the other"


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_abort_ends_a_stream_that_its_client_leaves_open(up: Up, num_choices: int) -> None:
    call = up.engine.Generate(request("abc", request_id="left", n=num_choices, max_tokens=ENDLESS, ignore_eos=True))
    responses = aiter(call)
    await anext(responses)
    await up.engine.Abort(vllm.AbortRequest(request_ids=["left", "unknown"]))
    await up.is_idle()
    rest = [response async for response in responses]  # ends, without an error
    assert {one.complete.finish_reason for one in rest if one.HasField("complete")} == {"abort"}


async def test_a_client_that_cancels_frees_all_of_its_choices(up: Up) -> None:
    call = up.engine.Generate(request("abc", n=3, max_tokens=ENDLESS, ignore_eos=True))
    await call.read()
    assert up.serving.driver.fleet.snapshot().num_live_requests == 3
    call.cancel()
    await up.is_idle()


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": -1.0}, "sampling_params.temperature"),
        ({"temperature": float("nan")}, "sampling_params.temperature"),
        ({"top_p": 1.5}, "sampling_params.top_p"),
        ({"top_k": 2**31}, "sampling_params.top_k"),
        ({"max_tokens": 0}, "sampling_params.max_tokens"),
        ({"max_tokens": 510}, "sampling_params.max_tokens"),
        ({"min_tokens": 7}, "sampling_params.min_tokens"),
        ({"logprobs": -1}, "sampling_params.logprobs"),
        ({"logprobs": 21}, "sampling_params.logprobs"),
        ({"logit_bias": {-5: 1.0}}, "sampling_params.logit_bias"),
        ({"logit_bias": {300: 1.0}}, "sampling_params.logit_bias"),
        ({"stop": [""]}, "sampling_params.stop[0]"),
        ({"stop_token_ids": [300]}, "sampling_params.stop_token_ids"),
        ({"n": 129}, "sampling_params.n"),
        ({"prompt_logprobs": 1}, "sampling_params.prompt_logprobs"),
        ({"json_schema": "{"}, "sampling_params.json_schema"),
        ({"regex": "("}, "sampling_params.regex"),
        ({"choice": vllm.ChoiceConstraint(choices=["a", ""])}, "sampling_params.choice"),
        ({"choice": vllm.ChoiceConstraint()}, "sampling_params.choice"),
        ({"structural_tag": "{}"}, "sampling_params.structural_tag"),
    ],
)
async def test_a_bad_parameter_is_refused_by_the_name_that_it_has_here(
    up: Up, sampling: dict[str, Any], field: str
) -> None:
    assert await refused(up.generate(request("abc", **sampling))) == ("INVALID_ARGUMENT", field)


async def test_a_bad_prompt_is_refused_by_the_name_that_it_has_here(up: Up) -> None:
    unknown, media = request(""), request("abc")
    unknown.tokenized.input_ids.append(300)
    media.mm_inputs.im_token_id = 3
    for bad, field in (
        (vllm.GenerateRequest(), "input"),
        (request(""), "tokenized.input_ids"),
        (_without_max_tokens("x" * 600), "tokenized.input_ids"),
        (unknown, "tokenized.input_ids"),
        (media, "mm_inputs"),
    ):
        assert await refused(up.generate(bad)) == ("INVALID_ARGUMENT", field)
    embedding = vllm.EmbedRequest(tokenized=unknown.tokenized)
    assert (await refused(up.engine.Embed(embedding)))[0] == "INVALID_ARGUMENT"
    broken = up.channel.unary_stream("/vllm.grpc.engine.VllmEngine/Generate")(b"\xff")
    assert await refused(broken.read()) == ("INVALID_ARGUMENT", "request")


async def test_a_full_queue_refuses_and_the_load_tells_of_it(up: Up) -> None:
    fleet, names = up.serving.driver.fleet, [f"r{number}" for number in range(6)]  # 4 run, 1 is on the replica, 1 waits
    calls = [request("abc", request_id=name, max_tokens=ENDLESS, ignore_eos=True) for name in names]
    begun = [asyncio.ensure_future(up.engine.Generate(call).read()) for call in calls]
    try:
        await eventually(lambda: fleet.snapshot().num_queued_requests == 1)
        assert await refused(up.generate(request("abc"))) == ("RESOURCE_EXHAUSTED", "")
        await eventually(lambda: fleet.snapshot().replicas[0].stats.num_running == 4)
        (load,) = (await up.engine.GetLoads(vllm.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (4, 2, 6)
        assert 0 < load.token_usage < 1
    finally:
        await up.engine.Abort(vllm.AbortRequest(request_ids=names))
        await asyncio.gather(*begun)
        await up.is_idle()


async def test_the_tokenizer_comes_in_parts_and_gives_the_same_ids(up: Up, tokenizer: Tokenizer) -> None:
    parts = [part async for part in up.engine.GetTokenizer(common_pb2.GetTokenizerRequest())]
    assert [bool(part.sha256) for part in parts] == [False] * (len(parts) - 1) + [True]
    with zipfile.ZipFile(io.BytesIO(b"".join(part.data for part in parts))) as archive:
        names, file = archive.namelist(), archive.read("tokenizer.json")
    assert names == ["tokenizer.json", "tokenizer_config.json", "config.json"]
    assert tokenizers.Tokenizer.from_buffer(file).encode("hi").ids == tokenizer.encode("hi")


async def test_a_gateway_learns_what_is_served_and_that_it_is_well(up: Up) -> None:
    model = await up.engine.GetModelInfo(vllm.GetModelInfoRequest())
    assert (model.served_model_name, model.is_generation, model.max_context_length) == ("parrot", True, 512)
    assert (model.vocab_size, model.eos_token_ids) == (300, [258])
    assert (await up.engine.GetServerInfo(vllm.GetServerInfoRequest())).data_parallel_size == 1
    assert (await up.engine.HealthCheck(vllm.HealthCheckRequest())).healthy
    health = await health_pb2_grpc.HealthStub(up.channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_what_is_not_there_is_said_without_a_word_in_the_log(up: Up, caplog: pytest.LogCaptureFixture) -> None:
    events = up.engine.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())
    assert (await refused(events.read()))[0] == "UNIMPLEMENTED"
    assert (await up.engine.FlushCache(common_pb2.FlushCacheRequest())).success
    assert not (await up.engine.StartProfile(common_pb2.StartProfileRequest())).success
    assert not (await up.engine.StopProfile(common_pb2.StopProfileRequest())).success
    control = up.channel.unary_unary("/shardray.v1.ControlService/GetFleet")(b"")
    assert (await refused(control))[0] == "UNIMPLEMENTED"
    assert caplog.records == []


async def test_calls_and_requests_are_counted_as_those_of_the_public_port(up: Up) -> None:
    before = up.observation.calls["Generate", "OK"]
    await up.generate(request("abc"))
    assert up.observation.calls["Generate", "OK"] == before + 1
