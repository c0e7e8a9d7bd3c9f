"""OLMoE: experts; queries and keys normalized over all heads at once, and clamped."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, change_attention, change_every_layer, optional, required
from shardray.runtime.model.families.llama import LLAMA_IGNORED, read_llama_like
from shardray.runtime.model.families.qwen_moe import moe_sources, read_num_experts
from shardray.runtime.model.spec import DecoderSpec, Experts


def _read_config(config: Config) -> DecoderSpec:
    spec = read_llama_like({"rms_norm_eps": 1e-5} | config)
    norm, clip = spec.head.norm, optional(config, "clip_qkv", 0.0) or None
    spec = change_attention(spec, q_norm=norm, k_norm=norm, norm_over="all", clip=clip)
    count, top_k = read_num_experts(config), required(config, "num_experts_per_tok", int)
    normalized = optional(config, "norm_topk_prob", False)
    return change_every_layer(spec, mlp=Experts(count, top_k, spec.layers[0].dense, normalized))


OLMOE = Family("olmoe", ("olmoe",), _read_config, moe_sources, LLAMA_IGNORED)
