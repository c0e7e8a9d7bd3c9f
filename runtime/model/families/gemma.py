"""Gemma 1 to 3 (text): norms around both blocks, scaled embeddings, soft caps, windows in most layers."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_every_layer,
    change_layers,
    optional,
    refuse_unless,
    required,
    windowed_layers,
)
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.rotary import read_rotary, with_rotary_of
from shardray.runtime.model.spec import DecoderSpec, Embedding, Norm, Norms


def _read_gemma(config: Config) -> DecoderSpec:
    """What all three share. Their norms multiply by 1 + weight."""
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation in (None, "gelu"):  # as the first ones called it
        activation = "gelu_pytorch_tanh"
    norm = Norm("rms", eps=optional(config, "rms_norm_eps", 1e-6), offset=1.0)
    spec = read_llama_like(config | {"hidden_act": activation}, norm=norm, tied=True)
    return replace(spec, embedding=Embedding(scale=spec.hidden_size**0.5))


def _read_sandwich(config: Config, pattern: int) -> DecoderSpec:
    """Gemma 2 and 3: every ``pattern``-th layer sees everything, the others a window."""
    spec = _read_gemma(config)
    norms = Norms(before=spec.head.norm, inner=spec.head.norm)
    spec = change_every_layer(spec, attention_norms=norms, mlp_norms=norms)
    spec = change_attention(
        spec,
        scale=required(config, "query_pre_attn_scalar", int) ** -0.5,
        softcap=optional(config, "attn_logit_softcapping", 0.0) or None,
    )
    head = replace(spec.head, softcap=optional(config, "final_logit_softcapping", 0.0) or None)
    return windowed_layers(replace(spec, head=head), config, lambda index: (index + 1) % pattern != 0)


def _read_gemma2(config: Config) -> DecoderSpec:
    return _read_sandwich({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | config, pattern=2)


def _read_gemma3(config: Config) -> DecoderSpec:
    """Windowed layers have rotary frequencies of their own."""
    refuse_unless(config, "use_bidirectional_attention", False)
    everywhere = with_rotary_of(config, "full_attention", optional(config, "rope_theta", 1e6))
    local = with_rotary_of(config, "sliding_attention", optional(config, "rope_local_base_freq", 1e4), is_scaled=False)
    spec = _read_sandwich(everywhere, pattern=optional(config, "sliding_window_pattern", 6))
    spec = change_attention(spec, q_norm=spec.head.norm, k_norm=spec.head.norm)
    rotary = read_rotary(local, spec.attention.head_dim)
    return change_layers(
        spec,
        lambda _, layer: (
            layer
            if layer.attention.window is None
            else replace(layer, attention=replace(layer.attention, rotary=rotary))
        ),
    )


def _sandwich_sources(spec: DecoderSpec) -> dict[str, Source]:
    return llama_like_sources(spec, mlp_norm__before="pre_feedforward_layernorm")


GEMMA = Family("gemma", ("gemma",), _read_gemma, llama_like_sources, LLAMA_IGNORED)
GEMMA2 = Family("gemma2", ("gemma2",), _read_gemma2, _sandwich_sources, LLAMA_IGNORED)
GEMMA3 = Family(
    "gemma3",
    ("gemma3_text",),
    _read_gemma3,
    _sandwich_sources,
    LLAMA_IGNORED,
    irrelevant={"_sliding_window_pattern": "used without layer_types alone"},
)
