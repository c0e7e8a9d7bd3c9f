"""Cohere 1 and 2: attention and MLP side by side behind one LayerNorm, pairs of neighbours rotated."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    change_attention,
    change_every_layer,
    optional,
    windowed_layers,
    without_positions,
)
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Norm, Norms


def _read_cohere(config: Config) -> DecoderSpec:
    return _read_both({"rope_theta": 500_000.0} | config)


def _read_both(config: Config) -> DecoderSpec:
    norm = Norm("layer", eps=optional(config, "layer_norm_eps", 1e-5))
    spec = read_llama_like(config, norm=norm, tied=True)
    rotary = replace(spec.attention.rotary, interleaved=True) if spec.attention.rotary is not None else None
    spec = change_attention(spec, rotary=rotary)
    if optional(config, "use_qk_norm", False):
        spec = change_attention(spec, q_norm=norm, k_norm=norm, norm_over="each")
    spec = change_every_layer(spec, parallel=True, mlp_norms=Norms())
    return replace(spec, head=replace(spec.head, scale=optional(config, "logit_scale", 0.0625)))


def _read_cohere2(config: Config) -> DecoderSpec:
    """Layers that see everything know no positions."""
    pattern = optional(config, "sliding_window_pattern", 4)
    spec = windowed_layers(_read_both(config), config, lambda index: (index + 1) % pattern != 0)
    return without_positions(spec, lambda _, layer: layer.attention.window is None)


COHERE = Family("cohere", ("cohere",), _read_cohere, llama_like_sources, LLAMA_IGNORED)
COHERE2 = Family("cohere2", ("cohere2",), _read_cohere2, llama_like_sources, LLAMA_IGNORED)
