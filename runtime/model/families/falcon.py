"""Falcon, all generations: ALiBi or rotary, one KV head, a few or all, one norm for both blocks or two."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    change_every_layer,
    change_mlp,
    fused_by_head,
    optional,
    sources,
)
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.rotary import read_rotary
from shardray.runtime.model.spec import DecoderSpec, Norms

_FIELDS = Fields(mlp_size="ffn_hidden_size", eps="layer_norm_epsilon", activation="activation")


def _read_config(config: Config) -> DecoderSpec:
    is_new = optional(config, "new_decoder_architecture", False)
    bias = optional(config, "bias", False)  # of the matrices; norms have theirs
    spec = read_gpt_like({"max_position_embeddings": 2048} | config, _FIELDS, activation="gelu")
    spec = change_mlp(spec, up_bias=bias, down_bias=bias)
    attention, num_kv_heads = spec.attention, spec.attention.num_heads
    if is_new:
        num_kv_heads = optional(config, "num_kv_heads", attention.num_heads)
    elif optional(config, "multi_query", True):
        num_kv_heads = 1
    has_alibi = optional(config, "alibi", False)
    spec = change_attention(
        spec,
        num_kv_heads=num_kv_heads,
        qkv_bias=bias,
        out_bias=bias,
        alibi=attention.scale if has_alibi else None,  # its slopes are scaled with the scores
        rotary=None if has_alibi else read_rotary(config, attention.head_dim),
    )
    if not (is_new or optional(config, "parallel_attn", True)):
        return spec
    has_two = optional(config, "num_ln_in_parallel_attn", 2 if is_new else 1) == 2
    norms = Norms(before=spec.head.norm if has_two else None)
    return change_every_layer(spec, parallel=True, mlp_norms=norms)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer, first = "h.{layer}.", spec.layers[0]
    has_two = first.parallel and first.mlp_norms.before is not None
    norms = ("ln_attn", "ln_mlp") if has_two else ("input_layernorm", "post_attention_layernorm")
    return fused_by_head(spec, layer + "self_attention.query_key_value") | sources(
        {
            "embed": "word_embeddings",
            "attention_norm.before": layer + norms[0],
            "o": layer + "self_attention.dense",
            "mlp_norm.before": layer + norms[1],
            "up": layer + "mlp.dense_h_to_4h",
            "down": layer + "mlp.dense_4h_to_h",
            "final_norm": "ln_f",
            "head": "word_embeddings" if spec.head.tied else "lm_head",
        }
    )


FALCON = Family(
    name="falcon",
    model_types=("falcon",),
    read_config=_read_config,
    sources=_sources,
    ignored=("lm_head.weight",),
    prefixes=("transformer.", ""),
    irrelevant={
        "multi_query": "used by the first generation alone",
        "parallel_attn": "used by the first generation alone",
        "num_kv_heads": "used by the second generation alone",
        "rope_parameters": "used without ALiBi alone",
    },
)
