"""EXAONE 4: norms on what blocks give and on queries and keys; layers that see everything know no positions."""

from __future__ import annotations

from collections.abc import Callable

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
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError, Norms


def _read_config(config: Config) -> DecoderSpec:
    config = {"rms_norm_eps": 1e-5, "sliding_window": 4096} | config
    spec = read_llama_like(config)
    norms = Norms(inner=spec.head.norm)
    spec = change_every_layer(spec, attention_norms=norms, mlp_norms=norms)
    spec = change_attention(spec, q_norm=spec.head.norm, k_norm=spec.head.norm)
    if not config.get("sliding_window"):
        return spec
    spec = windowed_layers(spec, config, _read_pattern(config, spec.num_layers))
    return without_positions(spec, lambda _, layer: layer.attention.window is None)


def _read_pattern(config: Config, num_layers: int) -> Callable[[int], bool]:
    """Which layers have a window: all but every n-th, or those with an L of the pattern (LLLG), but for the last."""
    turns = config.get("sliding_window_pattern")
    if not isinstance(turns, str):
        every = optional(config, "sliding_window_pattern", 4)
        return lambda index: (index + 1) % every != 0
    if not turns or turns.strip("LG"):
        raise ModelConfigError(f"config.json: sliding_window_pattern is {turns!r}, expected a number, or L's and G's")
    return lambda index: turns[index % len(turns)] == "L" and index + 1 < num_layers


EXAONE4 = Family(
    "exaone4",
    ("exaone4",),
    _read_config,
    llama_like_sources,
    LLAMA_IGNORED,
    irrelevant={
        "layer_types": "used with sliding_window alone",
        "sliding_window_pattern": "used without layer_types alone",
    },
)
