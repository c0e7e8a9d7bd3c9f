"""Phi 3 and 4: a Llama with fused projections."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, Source, fused_in_turn
from shardray.runtime.model.families.llama import LAYER, LLAMA_IGNORED, llama_like_sources
from shardray.runtime.model.families.mistral import read_mistral
from shardray.runtime.model.spec import DecoderSpec


def _read_config(config: Config) -> DecoderSpec:
    return read_mistral({"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096} | config)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    fused = LAYER + "mlp.gate_up_proj.weight"
    gate, up = Source(fused), Source(fused, start=spec.layers[0].dense.size)
    found = llama_like_sources(spec) | fused_in_turn(spec, LAYER + "self_attn.qkv_proj")
    return found | {"gate.weight": gate, "up.weight": up}


PHI3 = Family(
    "phi3",
    ("phi3",),
    _read_config,
    _sources,
    LLAMA_IGNORED,
    irrelevant={"original_max_position_embeddings": "used with a scaling alone"},
)
