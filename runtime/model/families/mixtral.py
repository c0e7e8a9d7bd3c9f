"""Mixtral: a Mistral with experts."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, Source, change_every_layer, required
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources
from shardray.runtime.model.families.mistral import read_mistral
from shardray.runtime.model.spec import DecoderSpec, Experts


def _read_config(config: Config) -> DecoderSpec:
    spec = read_mistral({"rms_norm_eps": 1e-5, "rope_theta": 1e6} | config)
    count, top_k = required(config, "num_local_experts", int), required(config, "num_experts_per_tok", int)
    return change_every_layer(spec, mlp=Experts(count, top_k, spec.layers[0].dense, normalized=True))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    modules = {"router": "block_sparse_moe.gate"}
    for name, stored in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        modules[f"experts.{name}"] = f"block_sparse_moe.experts.{{row}}.{stored}"
    return llama_like_sources(spec, **modules)


MIXTRAL = Family("mixtral", ("mixtral",), _read_config, _sources, LLAMA_IGNORED)
