"""Granite: a Llama with multipliers on embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, change_attention, change_every_layer, optional
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec, Embedding


def _read_config(config: Config) -> DecoderSpec:
    spec = change_attention(read_llama_like(config), scale=optional(config, "attention_multiplier", 1.0))
    spec = change_every_layer(spec, residual_scale=optional(config, "residual_multiplier", 1.0))
    head = replace(spec.head, scale=1.0 / optional(config, "logits_scaling", 1.0))
    return replace(spec, embedding=Embedding(scale=optional(config, "embedding_multiplier", 1.0)), head=head)


GRANITE = Family("granite", ("granite",), _read_config, llama_like_sources, LLAMA_IGNORED)
