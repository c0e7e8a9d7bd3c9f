"""StarCoder (GPT-BigCode): GPT-2 with one KV head for all. StarCoder2: rotary, grouped heads, a window."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_mlp,
    fused_by_head,
    optional,
    refuse_unless,
)
from shardray.runtime.model.families.gpt2 import GPT_IGNORED, gpt_sources
from shardray.runtime.model.families.gpt_like import OLD, read_gpt_like
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Norm


def _read_bigcode(config: Config) -> DecoderSpec:
    refuse_unless(config, "add_cross_attention", False)
    spec = read_gpt_like(config, OLD, positions=True, activation="gelu_pytorch_tanh")
    if not optional(config, "scale_attn_weights", True):
        spec = change_attention(spec, scale=1.0)
    return change_attention(spec, num_kv_heads=1) if optional(config, "multi_query", True) else spec


def _bigcode_sources(spec: DecoderSpec) -> dict[str, Source]:
    return gpt_sources(spec) | fused_by_head(spec, "h.{layer}.attn.c_attn")


def _read_starcoder2(config: Config) -> DecoderSpec:
    bias = optional(config, "use_bias", True)
    norm = Norm("layer", eps=optional(config, "norm_epsilon", 1e-5), has_bias=True)
    spec = read_llama_like({"hidden_act": "gelu_pytorch_tanh"} | config, norm=norm, tied=True)
    window = optional(config, "sliding_window", 0) or None
    spec = change_attention(spec, qkv_bias=bias, out_bias=bias, window=window)
    return change_mlp(spec, gated=False, up_bias=bias, down_bias=bias)


def _starcoder2_sources(spec: DecoderSpec) -> dict[str, Source]:
    return llama_like_sources(spec, up="mlp.c_fc", down="mlp.c_proj")


GPT_BIGCODE = Family(
    name="gpt-bigcode",
    model_types=("gpt_bigcode",),
    read_config=_read_bigcode,
    sources=_bigcode_sources,
    ignored=GPT_IGNORED,
    prefixes=("transformer.", ""),
    irrelevant={"num_key_value_heads": "follows from multi_query"},
)
STARCODER2 = Family("starcoder2", ("starcoder2",), _read_starcoder2, _starcoder2_sources, LLAMA_IGNORED)
