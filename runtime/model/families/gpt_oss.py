"""gpt-oss: experts with biases and a gate of their own, attention sinks, windows in every other layer."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_every_layer,
    optional,
    refuse_unless,
    required,
    sources,
    windowed_layers,
)
from shardray.runtime.model.families.llama import LAYER, LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Experts, Mlp

_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def _read_config(config: Config) -> DecoderSpec:
    refuse_unless(config, "swiglu_limit", 7.0)
    refuse_unless(config, "swiglu_alpha", 1.702)
    defaults = {"rms_norm_eps": 1e-5, "attention_bias": True, "rope_theta": 150_000.0}
    spec = read_llama_like(defaults | config | {"rope_parameters": config.get("rope_parameters") or _ROPE})
    spec = change_attention(spec, has_sinks=True)
    spec = windowed_layers(spec, {"sliding_window": 128} | config, lambda index: index % 2 == 0)
    size = required(config, "intermediate_size", int)
    mlp = Mlp(size, "clamped_swiglu", gated=True, up_bias=True, down_bias=True, interleaved=True)
    count, top_k = required(config, "num_local_experts", int), optional(config, "num_experts_per_tok", 4)
    experts = Experts(count, top_k, mlp, normalized=True, router_bias=True)
    return change_every_layer(spec, mlp=experts)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    experts = LAYER + "mlp.experts."
    return llama_like_sources(spec) | {
        **sources({"router": LAYER + "mlp.router"}),
        "sinks": Source(LAYER + "self_attn.sinks"),
        "experts.gate_up.weight": Source(experts + "gate_up_proj", transposed=True),
        "experts.gate_up.bias": Source(experts + "gate_up_proj_bias"),
        "experts.down.weight": Source(experts + "down_proj", transposed=True),
        "experts.down.bias": Source(experts + "down_proj_bias"),
    }


GPT_OSS = Family(
    name="gpt-oss",
    model_types=("gpt_oss",),
    read_config=_read_config,
    sources=_sources,
    ignored=LLAMA_IGNORED,
    quantizations=("mxfp4",),
)
