"""Phi 1 and 2: attention and MLP side by side behind one LayerNorm, rotary on half of each head, a biased head."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_every_layer,
    change_mlp,
    optional,
)
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Norm, Norms


def _read_config(config: Config) -> DecoderSpec:
    norm = Norm("layer", eps=optional(config, "layer_norm_eps", 1e-5), has_bias=True)
    defaults = {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5}
    spec = read_llama_like(defaults | config, norm=norm)
    spec = change_attention(spec, qkv_bias=True, out_bias=True)
    if optional(config, "qk_layernorm", False):
        spec = change_attention(spec, q_norm=norm, k_norm=norm)
    spec = change_mlp(spec, gated=False, up_bias=True, down_bias=True)
    spec = change_every_layer(spec, parallel=True, mlp_norms=Norms())
    return replace(spec, head=replace(spec.head, bias=True))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    return llama_like_sources(
        spec,
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        o="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
    ) | {f"final_norm.{part}": Source(f"model.final_layernorm.{part}") for part in ("weight", "bias")}


PHI = Family("phi", ("phi",), _read_config, _sources, LLAMA_IGNORED)
