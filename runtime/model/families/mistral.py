"""Mistral: a Llama whose tokens may see a window only."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, change_attention, optional
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.spec import DecoderSpec


def read_mistral(config: Config) -> DecoderSpec:
    """A Llama of the config's sizes, with its window."""
    return change_attention(read_llama_like(config), window=optional(config, "sliding_window", 0) or None)


def _read_config(config: Config) -> DecoderSpec:
    return read_mistral({"sliding_window": 4096} | config)


MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    read_config=_read_config,
    sources=llama_like_sources,
    ignored=LLAMA_IGNORED,
)
