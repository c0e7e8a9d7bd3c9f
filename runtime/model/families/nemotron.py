"""Nemotron: LayerNorm with 1 + weight, squared ReLU without a gate, rotary on half of each head."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, change_mlp, optional
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Norm


def _read_config(config: Config) -> DecoderSpec:
    norm = Norm("layer", eps=optional(config, "norm_eps", 1e-5), has_bias=True, offset=1.0)
    defaults = {"hidden_act": "relu2", "partial_rotary_factor": 0.5}
    return change_mlp(read_llama_like(defaults | config, norm=norm), gated=False)


NEMOTRON = Family("nemotron", ("nemotron",), _read_config, llama_like_sources, LLAMA_IGNORED)
