"""Mixtral: a Mistral with experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardray.runtime.model.families.family import Family, Source, change_attention, change_layers, optional, required
from shardray.runtime.model.families.llama import LAYER, LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Experts


def _read_config(config: Mapping[str, Any]) -> DecoderSpec:
    spec = read_llama_like({"rms_norm_eps": 1e-5, **config})
    spec = change_attention(spec, window=optional(config, "sliding_window", 0) or None)
    count, top_k = required(config, "num_local_experts", int), required(config, "num_experts_per_tok", int)
    return change_layers(spec, lambda _, layer: replace(layer, mlp=Experts(count, top_k, layer.dense, normalized=True)))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    block = LAYER + "block_sparse_moe."
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return llama_like_sources(spec, router="block_sparse_moe.gate") | {
        f"experts.{name}.weight": Source(f"{block}experts.{{row}}.{stored}.weight") for name, stored in names.items()
    }


MIXTRAL = Family("mixtral", ("mixtral",), _read_config, _sources, LLAMA_IGNORED)
