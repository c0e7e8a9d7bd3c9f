"""Rotary tables against those of transformers, and configs that are refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.positions import LinearScaling, Llama3Scaling, YarnScaling
from shardray.runtime.model.rotary import read_rotary
from shardray.runtime.model.rotary_angles import rotary_angles
from shardray.runtime.model.spec import ModelConfigError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SETTINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    LLAMA3,
    LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 256},
    LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 2.5, "original_max_position_embeddings": 64},
    YARN,
    YARN | {"factor": 1.0},
    YARN | {"factor": 16.0, "beta_fast": 64.0, "beta_slow": 2.0},
    YARN | {"attention_factor": 0.75},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    YARN | {"mscale": 0.7},
    YARN | {"truncate": False},
    YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
]


def config_of(head_dim: int, theta: float, parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters=parameters | {"rope_theta": theta},
    )


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("parameters", SETTINGS, ids=lambda parameters: "-".join(map(str, parameters.values())))
def test_tables_are_those_of_transformers(parameters: dict[str, Any], head_dim: int, theta: float) -> None:
    config = config_of(head_dim, theta, parameters)
    positions = torch.arange(2048)[None]
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    cos, sin, _ = rotary_angles(read_rotary(config.to_dict(), head_dim), 2048)
    assert cos.shape == (2048, head_dim // 2)
    # The exponents of torch round differently now and then; the angle of position 2047 magnifies it.
    torch.testing.assert_close(cos, expected_cos[0, :, : head_dim // 2], atol=5e-4, rtol=0)
    torch.testing.assert_close(sin, expected_sin[0, :, : head_dim // 2], atol=5e-4, rtol=0)


def test_old_and_new_fields_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131_072}
    new = {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "max_position_embeddings": 131_072}
    older = old | {"rope_scaling": {**LLAMA3, "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]  # type: ignore[attr-defined]
    expected = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    for config in (old, new, older):
        rotary = read_rotary(config, 128)
        assert (rotary.theta, rotary.dim, rotary.scaling) == (5e5, 128, expected)


def test_of_both_fields_the_older_one_counts() -> None:
    fields = {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    config = LlamaConfig(**copy.deepcopy(fields)).rope_parameters
    assert (config["rope_type"], config["rope_theta"]) == ("linear", 10_000.0)
    found = read_rotary(Config(fields), 64)
    assert (found.theta, found.scaling) == (10_000.0, LinearScaling(4.0))


def test_nothing_said_is_the_plain_table_of_theta_ten_thousand() -> None:
    for config in ({}, {"rope_scaling": None}, {"rope_parameters": {}}, {"rope_scaling": {"type": "default"}}):
        rotary = read_rotary(config, 64)
        assert (rotary.theta, rotary.dim, rotary.scaling) == (10_000.0, 64, None)


def test_a_share_of_each_head_may_be_rotated() -> None:
    assert read_rotary({"partial_rotary_factor": 0.25}, 64).dim == 16
    assert read_rotary({"rope_parameters": {"partial_rotary_factor": 0.5}}, 64).dim == 32


def test_linear_scaling_is_read() -> None:
    assert read_rotary({"rope_scaling": {"type": "linear", "factor": 4}}, 64).scaling == LinearScaling(4.0)


def test_yarn_takes_the_stretch_of_the_window_where_it_names_no_factor() -> None:
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    found = read_rotary({"rope_scaling": scaling, "max_position_embeddings": 8192}, 64).scaling
    assert found == YarnScaling(8.0, 1024)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "long_factor": [1.0 + 0.5 * i for i in range(32)],
    "original_max_position_embeddings": 512,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}


@pytest.mark.parametrize("num_positions", [500, 512, 513, 2048])
@pytest.mark.parametrize(
    "parameters",
    [DYNAMIC, DYNAMIC | {"original_max_position_embeddings": 128}, LONGROPE, LONGROPE | {"factor": 16.0}],
    ids=["dynamic", "dynamic, from less", "longrope", "longrope, with a factor"],
)
def test_scalings_by_length_are_those_of_the_longest_context(parameters: dict[str, Any], num_positions: int) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=512 if parameters["rope_type"] == "dynamic" else 2048,
        rope_parameters=parameters | {"rope_theta": 10_000.0},
    )
    positions = torch.arange(num_positions)[None]
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    cos, sin, _ = rotary_angles(read_rotary(config.to_dict(), 64), num_positions)
    torch.testing.assert_close(cos, expected_cos[0, :, :32], atol=5e-4, rtol=0)
    torch.testing.assert_close(sin, expected_sin[0, :, :32], atol=5e-4, rtol=0)


def test_an_unknown_type_is_refused_with_its_name() -> None:
    with pytest.raises(
        ModelConfigError,
        match=r"rope_type 'mrope' is not supported; the nearest is '\w+' .*linear, llama3, longrope, yarn",
    ):
        read_rotary({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "the rotary scaling lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', expected a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2.0, expected a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": math.inf}}, "factor is inf, expected a positive number"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "the rotary scaling lacks 'low_freq_factor'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor 1 must be below high_freq_factor 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "lacks 'original_max_position_embeddings'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "max_position_embeddings": 64}, "short_factor of"),
        ({"rope_theta": "big"}, "rope_theta is 'big', expected a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"partial_rotary_factor": 0.05}, "an even number of elements of each head, not 3"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_its_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read_rotary(config, 64)
    assert message in str(caught.value)
