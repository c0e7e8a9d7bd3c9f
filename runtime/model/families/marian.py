"""Marian's and M2M100's translators: sinusoidal positions, scaled embeddings; norms after the sums, or before."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.encoder_like import PAIR_IGNORED, Pair, pair_sources, read_pair
from shardray.runtime.model.families.family import Family, refuse_unless, required
from shardray.runtime.model.positions import Sinusoidal
from shardray.runtime.model.spec import DecoderSpec

_POSITIONS = ("*embed_positions.weight", "*embed_positions.weights")


def _read_marian(config: Config) -> DecoderSpec:
    refuse_unless(config, "share_encoder_decoder_embeddings", True)
    refuse_unless(config, "decoder_vocab_size", config.get("vocab_size"))
    positions = Sinusoidal(required(config, "max_position_embeddings", int), in_halves=True)
    return read_pair(config, Pair(positions, has_logit_bias=True))


def _read_m2m100(config: Config) -> DecoderSpec:
    most = required(config, "max_position_embeddings", int)
    positions = Sinusoidal(most, offset=2, in_halves=True, reaches_end=True)
    return read_pair(config, Pair(positions, norms_before=True, scales=True, activation="relu"))


MARIAN = Family(
    name="marian",
    model_types=("marian",),
    read_config=_read_marian,
    sources=pair_sources,
    ignored=(*PAIR_IGNORED, *_POSITIONS),
    prefixes=("model.", ""),
)

M2M100 = Family(
    name="m2m100",
    model_types=("m2m_100",),
    read_config=_read_m2m100,
    sources=pair_sources,
    ignored=(*PAIR_IGNORED, *_POSITIONS),
    prefixes=("model.", ""),
)
