"""BART and mBART: encoder and decoder, learned positions from 2 on, a norm on the embeddings."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.encoder_like import PAIR_IGNORED, Pair, pair_sources, read_pair
from shardray.runtime.model.families.family import Family, required
from shardray.runtime.model.positions import Learned
from shardray.runtime.model.spec import DecoderSpec


def _read_config(config: Config) -> DecoderSpec:
    positions = Learned(required(config, "max_position_embeddings", int), offset=2)
    is_mbart = config["model_type"] == "mbart"
    return read_pair(config, Pair(positions, norms_before=is_mbart, norms_embeddings=True, has_logit_bias=True))


BART = Family(
    name="bart",
    model_types=("bart", "mbart"),
    read_config=_read_config,
    sources=pair_sources,
    ignored=PAIR_IGNORED,
    prefixes=("model.", ""),
)
