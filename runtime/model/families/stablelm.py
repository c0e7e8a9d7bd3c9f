"""StableLM: LayerNorm, rotary on a quarter of each head; some with norms for each head."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, Source, change_attention, change_every_layer, optional
from shardray.runtime.model.families.llama import LAYER, LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Norm, Norms


def _read_config(config: Config) -> DecoderSpec:
    norm = Norm("layer", eps=optional(config, "layer_norm_eps", 1e-5), has_bias=True)
    spec = read_llama_like({"partial_rotary_factor": 0.25} | config, norm=norm)
    spec = change_attention(spec, qkv_bias=optional(config, "use_qkv_bias", False), out_bias=False)
    if optional(config, "qk_layernorm", False):
        head_norm = replace(norm, has_bias=False)
        spec = change_attention(spec, q_norm=head_norm, k_norm=head_norm, norm_over="each")
    if optional(config, "use_parallel_residual", False):
        spec = change_every_layer(spec, parallel=True, mlp_norms=Norms())
    return spec


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    norms = {f"{name}_norm.weight": f"self_attn.{name}_layernorm.norms.{{row}}.weight" for name in "qk"}
    return llama_like_sources(spec) | {name: Source(LAYER + stored) for name, stored in norms.items()}


STABLELM = Family("stablelm", ("stablelm",), _read_config, _sources, LLAMA_IGNORED)
