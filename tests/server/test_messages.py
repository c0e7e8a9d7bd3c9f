"""Public messages become the engine's structs."""

from __future__ import annotations

import pytest

from shardray.runtime.engine.request import FieldError, SamplingParams
from shardray.runtime.server import messages
from shardray.v1 import common_pb2


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
