"""Phi 3 and 4: a Llama with fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardray.runtime.model.families.family import Family, Source, change_attention, optional
from shardray.runtime.model.families.llama import LAYER, LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec


def _read_config(config: Mapping[str, Any]) -> DecoderSpec:
    return change_attention(read_llama_like(config), window=optional(config, "sliding_window", 0) or None)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    dim, heads, kv_heads = spec.attention.head_dim, spec.attention.num_heads, spec.attention.num_kv_heads
    starts = {"q": 0, "k": heads * dim, "v": (heads + kv_heads) * dim}
    found = llama_like_sources(spec)
    for name, start in starts.items():
        found[f"{name}.weight"] = Source(LAYER + "self_attn.qkv_proj.weight", start=start)
    for name, start in {"gate": 0, "up": spec.layers[0].dense.size}.items():
        found[f"{name}.weight"] = Source(LAYER + "mlp.gate_up_proj.weight", start=start)
    return found


PHI3 = Family("phi3", ("phi3",), _read_config, _sources, LLAMA_IGNORED)
