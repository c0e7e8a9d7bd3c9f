"""GPT-2: LayerNorm, learned positions, GELU, biases, and a fused qkv matrix that is stored transposed."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    fused_in_turn,
    optional,
    refuse_unless,
    sources,
)
from shardray.runtime.model.families.gpt_like import OLD, read_gpt_like
from shardray.runtime.model.spec import DecoderSpec


def _read_config(config: Config) -> DecoderSpec:
    refuse_unless(config, "scale_attn_by_inverse_layer_idx", False)
    refuse_unless(config, "add_cross_attention", False)
    spec = read_gpt_like(config, OLD, positions=True)
    return spec if optional(config, "scale_attn_weights", True) else change_attention(spec, scale=1.0)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "h.{layer}."
    found = gpt_sources(spec) | fused_in_turn(spec, layer + "attn.c_attn", transposed=True)
    for module, name in {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}.items():
        found[f"{module}.weight"] = Source(f"{layer}{name}.weight", transposed=True)
    return found


def gpt_sources(spec: DecoderSpec) -> dict[str, Source]:
    """The names that GPT-2 gave, but for queries, keys and values; nothing transposed."""
    layer = "h.{layer}."
    return sources(
        {
            "embed": "wte",
            "positions": "wpe",
            "attention_norm.before": layer + "ln_1",
            "o": layer + "attn.c_proj",
            "mlp_norm.before": layer + "ln_2",
            "up": layer + "mlp.c_fc",
            "down": layer + "mlp.c_proj",
            "final_norm": "ln_f",
            "head": "wte" if spec.head.tied else "lm_head",
        }
    )


GPT_IGNORED = (
    "*.attn.bias",
    "*.attn.masked_bias",
    "*.attn.causal_mask",
    "*.attention.bias",
    "*.attention.masked_bias",
    "lm_head.weight",
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    read_config=_read_config,
    sources=_sources,
    ignored=GPT_IGNORED,
    prefixes=("transformer.", ""),
)
