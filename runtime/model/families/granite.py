"""Granite: a Llama with multipliers on embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, change_attention, change_every_layer, optional
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Embedding


def _read_config(config: Config) -> DecoderSpec:
    spec = change_attention(read_llama_like(config), scale=_factor(config, "attention_multiplier"))
    spec = change_every_layer(spec, residual_scale=_factor(config, "residual_multiplier"))
    head = replace(spec.head, scale=1.0 / _factor(config, "logits_scaling"))
    return replace(spec, embedding=Embedding(scale=_factor(config, "embedding_multiplier")), head=head)


def _factor(config: Config, field: str) -> float:
    """Such fields are whole numbers in some configs."""
    value = config.get(field)
    return float(value) if isinstance(value, int) else optional(config, field, 1.0)


GRANITE = Family("granite", ("granite",), _read_config, llama_like_sources, LLAMA_IGNORED)
