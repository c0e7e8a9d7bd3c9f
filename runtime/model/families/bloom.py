"""BLOOM: ALiBi, a norm on the embeddings; q, k, v of each head side by side."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_attention,
    fused_by_head,
    refuse_unless,
    sources,
)
from shardray.runtime.model.families.gpt2 import GPT_IGNORED
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.spec import DecoderSpec, Embedding

_FIELDS = Fields(num_layers="n_layer", num_heads="n_head", eps="layer_norm_epsilon", max_positions="seq_length")


def _read_config(config: Config) -> DecoderSpec:
    refuse_unless(config, "apply_residual_connection_post_layernorm", False)
    hidden = config.get("hidden_size") or config.get("n_embed")
    heads = config.get("n_head") or config.get("num_attention_heads")
    same = {"hidden_size": hidden, "n_head": heads, "seq_length": config.get("seq_length") or 2048}
    spec = change_attention(read_gpt_like(config | same, _FIELDS), alibi=1.0)
    return replace(spec, embedding=Embedding(norm=spec.head.norm))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "h.{layer}."
    return fused_by_head(spec, layer + "self_attention.query_key_value") | sources(
        {
            "embed": "word_embeddings",
            "embed_norm": "word_embeddings_layernorm",
            "attention_norm.before": layer + "input_layernorm",
            "o": layer + "self_attention.dense",
            "mlp_norm.before": layer + "post_attention_layernorm",
            "up": layer + "mlp.dense_h_to_4h",
            "down": layer + "mlp.dense_4h_to_h",
            "final_norm": "ln_f",
            "head": "word_embeddings" if spec.head.tied else "lm_head",
        }
    )


BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    read_config=_read_config,
    sources=_sources,
    ignored=GPT_IGNORED,
    prefixes=("transformer.", ""),
    irrelevant={"pretraining_tp": "of training"},
)
