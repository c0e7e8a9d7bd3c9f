"""MPT: ALiBi, no biases, fused q, k, v."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_mlp,
    fused_in_turn,
    optional,
    refuse_unless,
    sources,
)
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.spec import DecoderSpec

_FIELDS = Fields("d_model", "n_layers", "n_heads", "", "max_seq_len", "", "layer_norm_epsilon")


def _read_config(config: Config) -> DecoderSpec:
    attention = config.get("attn_config") or {}
    refuse_unless(config, "no_bias", True)
    refuse_unless(config, "logit_scale", None)
    for field, expected in {"alibi": True, "qk_ln": False, "prefix_lm": False, "alibi_bias_max": 8}.items():
        refuse_unless(attention, field, expected)
    spec = read_gpt_like(config, _FIELDS, bias=False, activation="gelu")
    spec = change_mlp(spec, size=int(optional(config, "expansion_ratio", 4) * spec.hidden_size))
    scale = optional(attention, "softmax_scale", 0.0) or spec.attention.scale
    return change_attention(spec, alibi=1.0, scale=scale, clip=optional(attention, "clip_qkv", 0.0) or None)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "blocks.{layer}."
    return fused_in_turn(spec, layer + "attn.Wqkv") | sources(
        {
            "embed": "wte",
            "attention_norm.before": layer + "norm_1",
            "o": layer + "attn.out_proj",
            "mlp_norm.before": layer + "norm_2",
            "up": layer + "ffn.up_proj",
            "down": layer + "ffn.down_proj",
            "final_norm": "norm_f",
            "head": "wte" if spec.head.tied else "lm_head",
        }
    )


MPT = Family(
    name="mpt",
    model_types=("mpt",),
    read_config=_read_config,
    sources=_sources,
    ignored=("lm_head.weight",),
    prefixes=("transformer.", ""),
    irrelevant={
        "embedding_fraction": "of training",
        "learned_pos_emb": "has no effect where ALiBi is used",
        "norm_type": "says in which precision LayerNorm was trained",
    },
)
