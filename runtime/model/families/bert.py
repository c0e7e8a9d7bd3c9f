"""BERT, RoBERTa and DistilBERT, and the sentence encoders made of them: norms after the sums, learned positions."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.encoder_like import as_encoder, of_encoder
from shardray.runtime.model.families.family import (
    Family,
    Source,
    change_every_layer,
    optional,
    refuse_unless,
    sources,
)
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.positions import Learned
from shardray.runtime.model.spec import DecoderSpec, Embedding, Norms

_EPS = 1e-12
_DISTILBERT = Fields(
    hidden_size="dim", num_layers="n_layers", num_heads="n_heads", mlp_size="hidden_dim", activation="activation"
)


def _read_config(config: Config) -> DecoderSpec:
    refuse_unless(config, "position_embedding_type", "absolute")
    refuse_unless(config, "is_decoder", False)
    refuse_unless(config, "add_cross_attention", False)
    is_first = config["model_type"] == "bert"
    return _read(config, Fields(), offset=0 if is_first else optional(config, "pad_token_id", 1) + 1, num_types=2)


def _read_distilbert(config: Config) -> DecoderSpec:
    return _read(config, _DISTILBERT, offset=0, num_types=0)


def _read(config: Config, fields: Fields, offset: int, num_types: int) -> DecoderSpec:
    spec = read_gpt_like({"layer_norm_eps": _EPS} | config, fields, activation="gelu")
    norm = spec.head.norm
    spec = change_every_layer(spec, attention_norms=Norms(after=norm), mlp_norms=Norms(after=norm))
    spec = replace(spec, max_positions=spec.max_positions - offset)
    num_types = optional(config, "type_vocab_size", num_types) if num_types else 0
    return as_encoder(spec, Embedding(positions=Learned(spec.max_positions, offset), num_types=num_types, norm=norm))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "encoder.layer.{layer}."
    return of_encoder(
        sources(
            {name: f"{layer}attention.self.{module}" for name, module in (("q", "query"), ("k", "key"), ("v", "value"))}
            | {
                "embed": "embeddings.word_embeddings",
                "positions": "embeddings.position_embeddings",
                "types": "embeddings.token_type_embeddings",
                "embed_norm": "embeddings.LayerNorm",
                "o": layer + "attention.output.dense",
                "attention_norm.after": layer + "attention.output.LayerNorm",
                "up": layer + "intermediate.dense",
                "down": layer + "output.dense",
                "mlp_norm.after": layer + "output.LayerNorm",
            }
        )
    )


def _distilbert_sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "transformer.layer.{layer}."
    return of_encoder(
        sources(
            {name: f"{layer}attention.{name}_lin" for name in "qkv"}
            | {
                "embed": "embeddings.word_embeddings",
                "positions": "embeddings.position_embeddings",
                "embed_norm": "embeddings.LayerNorm",
                "o": layer + "attention.out_lin",
                "attention_norm.after": layer + "sa_layer_norm",
                "up": layer + "ffn.lin1",
                "down": layer + "ffn.lin2",
                "mlp_norm.after": layer + "output_layer_norm",
            }
        )
    )


_HEADS = ("pooler.*", "*.pooler.*", "cls.*", "lm_head.*", "classifier.*", "vocab_*", "*position_ids")

BERT = Family(
    name="bert",
    model_types=("bert", "roberta", "xlm-roberta", "camembert"),
    read_config=_read_config,
    sources=_sources,
    ignored=_HEADS,
    prefixes=("bert.", "roberta.", ""),
)

DISTILBERT = Family(
    name="distilbert",
    model_types=("distilbert",),
    read_config=_read_distilbert,
    sources=_distilbert_sources,
    ignored=(*_HEADS, "pre_classifier.*"),
    prefixes=("distilbert.", ""),
    irrelevant={"sinusoidal_pos_embds": "the checkpoint holds the positions either way"},
)
