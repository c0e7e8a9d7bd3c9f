"""Qwen2-MoE (a gated expert for all besides) and Qwen3-MoE; some layers may be dense."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, Source, change_attention, change_layers, optional, required
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources
from shardray.runtime.model.families.qwen import WINDOW_FIELDS, read_qwen2, read_qwen3
from shardray.runtime.model.spec import DecoderSpec, Experts, Layer


def read_num_experts(config: Config, field: str = "num_experts") -> int:
    """By the family's own name for it, or by Mixtral's, which newer configs use."""
    return required(config, "num_local_experts" if "num_local_experts" in config else field, int)


def _with_experts(spec: DecoderSpec, config: Config, shared_size: int = 0) -> DecoderSpec:
    count, top_k = read_num_experts(config), required(config, "num_experts_per_tok", int)
    size, normalized = required(config, "moe_intermediate_size", int), optional(config, "norm_topk_prob", False)
    step, dense = optional(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []

    def change(index: int, layer: Layer) -> Layer:
        if index in dense or (index + 1) % step:
            return layer
        mlp = layer.dense
        shared = replace(mlp, size=shared_size) if shared_size else None
        experts = Experts(count, top_k, replace(mlp, size=size), normalized, shared, has_shared_gate=shared is not None)
        return replace(layer, mlp=experts)

    return change_layers(spec, change)


def _read_qwen2_moe(config: Config) -> DecoderSpec:
    spec = change_attention(read_qwen2(config), qkv_bias=optional(config, "qkv_bias", True))
    return _with_experts(spec, config, required(config, "shared_expert_intermediate_size", int))


def _read_qwen3_moe(config: Config) -> DecoderSpec:
    return _with_experts(read_qwen3(config), config)


def moe_sources(spec: DecoderSpec, shared: str = "shared_expert") -> dict[str, Source]:
    """A Llama's, and what experts are made of as Qwen names it; ``shared`` is the MLP for all tokens."""
    modules = {"router": "mlp.gate", "shared_gate": "mlp.shared_expert_gate"}
    modules |= {f"shared.{name}": f"mlp.{shared}.{name}_proj" for name in ("gate", "up", "down")}
    modules |= {f"experts.{name}": f"mlp.experts.{{row}}.{name}_proj" for name in ("gate", "up", "down")}
    return llama_like_sources(spec, **modules)


QWEN2_MOE = Family(
    "qwen2-moe",
    ("qwen2_moe",),
    _read_qwen2_moe,
    moe_sources,
    LLAMA_IGNORED,
    irrelevant=WINDOW_FIELDS,
)
QWEN3_MOE = Family(
    "qwen3-moe",
    ("qwen3_moe",),
    _read_qwen3_moe,
    moe_sources,
    LLAMA_IGNORED,
    irrelevant=WINDOW_FIELDS,
)
