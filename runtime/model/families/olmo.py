"""OLMo 1 (LayerNorm without weights, clamped queries, keys and values) and 2 (norms on what blocks give)."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, change_attention, change_every_layer, optional
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Norm, Norms


def _read_olmo(config: Config) -> DecoderSpec:
    spec = read_llama_like(config, norm=Norm("layer", eps=1e-5, has_weight=False))
    return change_attention(spec, clip=optional(config, "clip_qkv", 0.0) or None)


def _read_olmo2(config: Config) -> DecoderSpec:
    """Queries and keys are normalized over all heads at once."""
    spec = read_llama_like({"rms_norm_eps": 1e-5} | config)
    norms = Norms(inner=spec.head.norm)
    spec = change_every_layer(spec, attention_norms=norms, mlp_norms=norms)
    return change_attention(spec, q_norm=spec.head.norm, k_norm=spec.head.norm, norm_over="all")


OLMO = Family("olmo", ("olmo",), _read_olmo, llama_like_sources, LLAMA_IGNORED)
OLMO2 = Family("olmo2", ("olmo2",), _read_olmo2, llama_like_sources, LLAMA_IGNORED)
