"""Qwen2 (biases on queries, keys and values) and Qwen3 (norms on queries and keys instead)."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, change_attention, optional, windowed_layers
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec


def _with_windows(spec: DecoderSpec, config: Config) -> DecoderSpec:
    if not optional(config, "use_sliding_window", False):
        return spec
    first = optional(config, "max_window_layers", spec.num_layers)
    return windowed_layers(spec, config, lambda index: index >= first)


def read_qwen2(config: Config) -> DecoderSpec:
    return _with_windows(change_attention(read_llama_like(config), qkv_bias=True), config)


def read_qwen3(config: Config) -> DecoderSpec:
    spec = read_llama_like(config)
    return _with_windows(change_attention(spec, q_norm=spec.head.norm, k_norm=spec.head.norm), config)


WINDOW_FIELDS = dict.fromkeys(
    ("layer_types", "max_window_layers", "sliding_window"), "used with use_sliding_window alone"
)

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    read_config=read_qwen2,
    sources=llama_like_sources,
    ignored=LLAMA_IGNORED,
    irrelevant=WINDOW_FIELDS,
)
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    read_config=read_qwen3,
    sources=llama_like_sources,
    ignored=LLAMA_IGNORED,
    irrelevant=WINDOW_FIELDS,
)
