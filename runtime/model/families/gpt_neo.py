"""GPT-Neo: GPT-2 with unscaled scores and, in every other layer, a window."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    of_each_layer,
    required,
    sources,
    windowed_layers,
)
from shardray.runtime.model.families.gpt2 import GPT_IGNORED, gpt_sources
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.spec import DecoderSpec

_FIELDS = Fields(
    num_layers="num_layers", num_heads="num_heads", activation="activation_function", eps="layer_norm_epsilon"
)


def _read_config(config: Config) -> DecoderSpec:
    spec = change_attention(read_gpt_like(config, _FIELDS, positions=True), scale=1.0, qkv_bias=False)
    turns = config.get("attention_types") or [[["global", "local"], 12]]  # [[kinds that take turns, how often], ...]
    default = [kind for kinds, count in turns for kind in kinds * count]
    kinds = of_each_layer(config, "attention_layers", spec.num_layers, ("global", "local"), default)
    config = config | {"sliding_window": required(config, "window_size", int)}
    return windowed_layers(spec, config, lambda index: kinds[index] == "local")


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    modules = {module: f"h.{{layer}}.attn.attention.{module}_proj" for module in "qkv"}
    return gpt_sources(spec) | sources(modules | {"o": "h.{layer}.attn.attention.out_proj"})


GPT_NEO = Family(
    name="gpt-neo",
    model_types=("gpt_neo",),
    read_config=_read_config,
    sources=_sources,
    ignored=GPT_IGNORED,
    prefixes=("transformer.", ""),
)
