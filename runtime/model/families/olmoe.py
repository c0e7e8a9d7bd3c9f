"""OLMoE: experts; queries and keys normalized over all heads at once, and clamped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardray.runtime.model.families.family import Family, Source, change_attention, change_layers, optional, required
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.families.qwen_moe import expert_sources, read_num_experts
from shardray.runtime.model.spec import DecoderSpec, Experts


def _read_config(config: Mapping[str, Any]) -> DecoderSpec:
    spec = read_llama_like({"rms_norm_eps": 1e-5, **config})
    norm, clip = spec.head.norm, optional(config, "clip_qkv", 0.0) or None
    spec = change_attention(spec, q_norm=norm, k_norm=norm, norm_over="all", clip=clip)
    count, top_k = read_num_experts(config), required(config, "num_experts_per_tok", int)
    normalized = optional(config, "norm_topk_prob", False)
    return change_layers(spec, lambda _, layer: replace(layer, mlp=Experts(count, top_k, layer.dense, normalized)))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    return llama_like_sources(spec, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm") | expert_sources()


OLMOE = Family("olmoe", ("olmoe",), _read_config, _sources, LLAMA_IGNORED)
