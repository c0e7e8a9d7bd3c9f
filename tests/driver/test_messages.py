"""What crosses the wire arrives as it was sent."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.cluster import messages
from shardray.runtime.cluster.messages import Rejection
from shardray.runtime.engine.request import (
    EncoderInfo,
    EngineRequest,
    EngineStats,
    FieldError,
    FinishReason,
    SamplingParams,
    ServedModel,
    TokenOutput,
)
from shardray.runtime.model.spec import Pooling
from shardray.v1 import common_pb2, replica_pb2

TOKEN_IDS = st.integers(0, 2**32 - 1)
# Log-probabilities travel as 32-bit floats, which is what the sampler computes them in.
LOGPROBS = st.floats(-1e6, 0, width=32)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-100, 100),
    frequency_penalty=st.floats(-100, 100),
    logit_bias=st.dictionaries(TOKEN_IDS, st.floats(-100, 100), max_size=3),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(5, 2**31 - 1),
    min_tokens=st.integers(0, 5),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(TOKEN_IDS, max_size=3).map(tuple),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    forced_token_ids=st.none() | st.lists(TOKEN_IDS, max_size=3).map(tuple),
)
POOLINGS = st.none() | st.builds(Pooling, st.sampled_from(["mean", "cls", "last"]), st.booleans())
OUTPUTS = st.builds(
    TokenOutput,
    request_id=st.text(max_size=8),
    token_id=st.none() | TOKEN_IDS,
    logprob=st.none() | LOGPROBS,
    top_logprobs=st.lists(st.tuples(TOKEN_IDS, LOGPROBS), max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    error=st.none() | st.text(min_size=1, max_size=8),
    embedding=st.none() | st.binary(min_size=4, max_size=8),
)


@given(
    params=PARAMS, prompt=st.lists(TOKEN_IDS, max_size=5), generated=st.lists(TOKEN_IDS, max_size=5), pooling=POOLINGS
)
def test_a_request_arrives_at_the_engine_as_the_driver_made_it(
    params: SamplingParams, prompt: list[int], generated: list[int], pooling: Pooling | None
) -> None:
    request = EngineRequest(
        request_id="a#1", prompt_ids=tuple(prompt), generated_ids=tuple(generated), params=params, priority=-3,
        pooling=pooling,
    )  # fmt: skip
    wire = messages.submit_command(request).SerializeToString()
    assert messages.request_from_submit(replica_pb2.ReplicaCommand.FromString(wire).submit) == request


@given(outputs=st.lists(OUTPUTS, max_size=4))
def test_a_steps_outputs_arrive_in_order_with_statistics_and_rejections(outputs: list[TokenOutput]) -> None:
    stats = EngineStats(num_running=3, num_pages=7, step_time_s=0.25)
    rejections = [Rejection("b#2", "max_tokens", "too many")]
    wire = messages.events_to_proto(outputs, rejections, stats).SerializeToString()
    events = replica_pb2.ReplicaEvents.FromString(wire)
    assert messages.outputs_from_events(events) == outputs
    assert messages.rejections_from_events(events) == rejections
    assert messages.stats_from_proto(events.stats) == stats


@pytest.mark.parametrize(
    "encoder", [None, EncoderInfo(64, start_ids=(2,), forced_ids=(9, 0)), EncoderInfo(64, pooling=Pooling("cls", True))]
)
def test_the_model_of_a_replica_survives_the_way(encoder: EncoderInfo | None) -> None:
    model = ServedModel(300, max_model_len=512, eos_token_ids=(2, 7), num_kv_tokens=100, encoder=encoder)
    assert messages.model_from_event(messages.model_event(model)) == model
    assert model.max_request_len == 100


def test_fields_that_a_client_leaves_out_take_the_documented_defaults() -> None:
    params = messages.params_from_proto(common_pb2.SamplingParameters(), default_seed=7, default_max_tokens=9)
    assert params == SamplingParams(seed=7, max_tokens=9)
    assert params.temperature == 1.0


def test_zero_is_a_value_and_not_the_same_as_unset() -> None:
    sampling = common_pb2.SamplingParameters(temperature=0, seed=0, logprobs=0)
    params = messages.params_from_proto(sampling, default_seed=7)
    assert (params.temperature, params.seed, params.logprobs) == (0.0, 0, 0)
    with pytest.raises(FieldError, match="max_tokens"):
        messages.params_from_proto(common_pb2.SamplingParameters(max_tokens=0))


def test_log_probabilities_keep_their_32_bits() -> None:
    logprob = struct.unpack("f", struct.pack("f", -0.1))[0]
    events = messages.events_to_proto([TokenOutput("a", 1, logprob)], [], None)
    assert messages.outputs_from_events(events)[0].logprob == logprob
