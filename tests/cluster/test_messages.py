"""What crosses the wire arrives as it was sent."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.cluster.messages import Cancel, Command, Events, Rejection, Submit
from shardray.runtime.engine.request import (
    EncoderInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    SamplingParams,
    ServedModel,
    TokenOutput,
)
from shardray.runtime.model.spec import Pooling

TOKEN_IDS = st.integers(0, 2**32 - 1)
LOGPROBS = st.floats(-1e6, 0)
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


def arrived(message: Any, kind: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind)


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
    assert arrived(Submit(request), Command) == Submit(request)
    assert arrived(Cancel("a#1"), Command) == Cancel("a#1")


@given(outputs=st.lists(OUTPUTS, max_size=4))
def test_a_steps_outputs_arrive_in_order_with_statistics_and_rejections(outputs: list[TokenOutput]) -> None:
    stats = EngineStats(num_running=3, num_pages=7, step_time_s=0.25)
    events = Events(outputs, [Rejection("b#2", "max_tokens", "too many")], stats)
    assert arrived(events, Events) == events


@given(first=st.lists(OUTPUTS, max_size=3), later=st.lists(OUTPUTS, max_size=3))
def test_what_a_slow_driver_did_not_take_is_merged_in_order(first: list[TokenOutput], later: list[TokenOutput]) -> None:
    old, new = EngineStats(num_steps=1), EngineStats(num_steps=2)
    events = Events(list(first), stats=old)
    events.merge(Events(list(later)))
    assert (events.outputs, events.stats, events.end) == (first + later, old, None)
    events.merge(Events(rejections=[Rejection("b#2", "prompt", "no")], stats=new, end="over"))
    assert (events.outputs, events.stats, events.end) == (first + later, new, "over")
    assert [rejection.field for rejection in events.rejections] == ["prompt"]


@pytest.mark.parametrize(
    "encoder", [None, EncoderInfo(64, start_ids=(2,), forced_ids=(9, 0)), EncoderInfo(64, pooling=Pooling("cls", True))]
)
def test_the_model_of_a_replica_survives_the_way(encoder: EncoderInfo | None) -> None:
    model = ServedModel(300, max_model_len=512, eos_token_ids=(2, 7), num_kv_tokens=100, encoder=encoder)
    assert arrived(model, ServedModel) == model
    assert model.max_request_len == 100
