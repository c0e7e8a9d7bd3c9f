"""DeepSeek V2 and V3: latent attention, experts shared by all tokens, routing within the best groups."""

from __future__ import annotations

import math
from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_layers,
    optional,
    refuse_unless,
    required,
    sources,
)
from shardray.runtime.model.families.llama import LAYER, LLAMA_IGNORED, read_llama_like
from shardray.runtime.model.families.qwen_moe import moe_sources, read_num_experts
from shardray.runtime.model.positions import YarnScaling
from shardray.runtime.model.rotary import read_rotary
from shardray.runtime.model.spec import DecoderSpec, Experts, Groups, Latent, Layer, Norm

_V3_DEFAULTS = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4}


def _read_attention(config: Config) -> DecoderSpec:
    """Both versions' attention and sizes, with dense layers"""
    refuse_unless(config, "attention_bias", False)
    interleaved = optional(config, "rope_interleave", True)
    plain_dim, rotary_dim = required(config, "qk_nope_head_dim", int), required(config, "qk_rope_head_dim", int)
    num_heads, dim = required(config, "num_attention_heads", int), plain_dim + rotary_dim
    sizes = {"head_dim": dim, "num_key_value_heads": num_heads, "partial_rotary_factor": rotary_dim / dim}
    spec = read_llama_like(config | sizes)
    rotary = replace(read_rotary(config | {"partial_rotary_factor": 1.0}, rotary_dim), interleaved=interleaved)
    latent = Latent(
        query_rank=optional(config, "q_lora_rank", 0) or None,
        kv_rank=required(config, "kv_lora_rank", int),
        plain_dim=plain_dim,
        value_dim=required(config, "v_head_dim", int),
        norm=Norm("rms", eps=1e-6),
    )
    scale = dim**-0.5
    if isinstance(rotary.scaling, YarnScaling) and rotary.scaling.mscale_all_dim:
        scale *= (0.1 * rotary.scaling.mscale_all_dim * math.log(rotary.scaling.factor) + 1.0) ** 2
    return change_attention(spec, rotary=rotary, latent=latent, scale=scale)


def _with_experts(spec: DecoderSpec, config: Config, experts: Experts) -> DecoderSpec:
    """The first layers are dense. ``experts`` has the family's routing; sizes come from the config."""
    first = config.get("first_k_dense_replace") or 0
    size = required(config, "moe_intermediate_size", int)

    def change(index: int, layer: Layer) -> Layer:
        if index < first:
            return layer
        mlp = replace(layer.dense, size=size)
        shared = replace(mlp, size=size * optional(config, "n_shared_experts", 1))
        return replace(layer, mlp=replace(experts, mlp=mlp, shared=shared))

    return change_layers(spec, change)


def _read_experts(config: Config, spec: DecoderSpec, judges: int) -> Experts:
    num_groups = optional(config, "n_group", 1)
    return Experts(
        num_experts=read_num_experts(config, "n_routed_experts"),
        top_k=required(config, "num_experts_per_tok", int),
        mlp=spec.layers[0].dense,
        normalized=optional(config, "norm_topk_prob", False),
        routes_in_float32=True,
        groups=Groups(num_groups, optional(config, "topk_group", 1), judges) if num_groups > 1 else None,
        scale=float(config.get("routed_scaling_factor") or 1.0),
    )


def _read_v2(config: Config) -> DecoderSpec:
    spec = _read_attention(config)
    experts = replace(_read_experts(config, spec, judges=1), normalized=False)
    if config.get("topk_method", "greedy") == "greedy":
        experts = replace(experts, groups=None)
    return _with_experts(spec, config, experts)


def _read_v3(config: Config) -> DecoderSpec:
    config = _V3_DEFAULTS | config
    spec = _read_attention(config)
    experts = _read_experts(config, spec, judges=2)
    return _with_experts(spec, config, replace(experts, scores="sigmoid", has_correction=True))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    latent = spec.attention.latent
    assert latent is not None
    modules = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}
    modules |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm"}
    modules["q"] = "q_proj" if latent.query_rank is None else "q_b_proj"
    correction = {"router.correction": Source(LAYER + "mlp.gate.e_score_correction_bias")}
    attention = sources({name: f"{LAYER}self_attn.{stored}" for name, stored in modules.items()})
    return moe_sources(spec, shared="shared_experts") | attention | correction


_IRRELEVANT = {
    "head_dim": "follows from those of the rotated and the plain elements",
    "qk_head_dim": "follows from those of the rotated and the plain elements",
    "num_key_value_heads": "latent attention makes a key and a value for every head",
    "pretraining_tp": "of training",
    "num_nextn_predict_layers": "layers that predict further tokens; they are not run",
}

DEEPSEEK_V2 = Family("deepseek-v2", ("deepseek_v2",), _read_v2, _sources, LLAMA_IGNORED, irrelevant=_IRRELEVANT)
DEEPSEEK_V3 = Family(
    "deepseek-v3", ("deepseek_v3",), _read_v3, _sources, (*LLAMA_IGNORED, "model.layers.{num_layers}.*"),
    irrelevant=_IRRELEVANT,
)  # fmt: skip
