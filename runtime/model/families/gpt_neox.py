"""GPT-NeoX and Pythia: attention and MLP side by side, each behind a norm; q, k, v of each head side by side."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_every_layer,
    fused_by_head,
    optional,
    sources,
)
from shardray.runtime.model.families.gpt2 import GPT_IGNORED
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.rotary import read_rotary
from shardray.runtime.model.spec import DecoderSpec


def _read_config(config: Config) -> DecoderSpec:
    spec = read_gpt_like(config, Fields(), tied=False, activation="gelu")
    bias = optional(config, "attention_bias", True)
    share = {"partial_rotary_factor": optional(config, "rotary_pct", 0.25), "rope_theta": config.get("rotary_emb_base")}
    rotary = read_rotary(share | config, spec.attention.head_dim)
    spec = change_attention(spec, rotary=rotary, qkv_bias=bias, out_bias=bias)
    return change_every_layer(spec, parallel=optional(config, "use_parallel_residual", True))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "gpt_neox.layers.{layer}."
    return fused_by_head(spec, layer + "attention.query_key_value") | sources(
        {
            "embed": "gpt_neox.embed_in",
            "attention_norm.before": layer + "input_layernorm",
            "o": layer + "attention.dense",
            "mlp_norm.before": layer + "post_attention_layernorm",
            "up": layer + "mlp.dense_h_to_4h",
            "down": layer + "mlp.dense_4h_to_h",
            "final_norm": "gpt_neox.final_layer_norm",
            "head": "gpt_neox.embed_in" if spec.head.tied else "embed_out",
        }
    )


GPT_NEOX = Family(
    name="gpt-neox",
    model_types=("gpt_neox",),
    read_config=_read_config,
    sources=_sources,
    ignored=(*GPT_IGNORED, "*.rotary_emb.inv_freq", "embed_out.weight"),
    irrelevant={"num_key_value_heads": "every head has its own"},
)
