"""What turns the description of a decoder into that of an encoder, and the two joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Source, optional, read_activation, refuse_unless, required, sources
from shardray.runtime.model.positions import Positions
from shardray.runtime.model.spec import (
    Attention,
    DecoderSpec,
    Embedding,
    Encoder,
    Head,
    Layer,
    Mlp,
    ModelConfigError,
    Norm,
    Norms,
)


def as_encoder(spec: DecoderSpec, embedding: Embedding, norm: Norm | None = None) -> DecoderSpec:
    """A model that gives embeddings: the layers of ``spec``, every token seeing all others."""
    layers = tuple(replace(layer, attention=replace(layer.attention, causal=False)) for layer in spec.layers)
    return replace(spec, layers=(), encoder=Encoder(spec.max_positions, embedding, layers, norm))


def of_encoder(found: Mapping[str, Source]) -> dict[str, Source]:
    """Sources of an encoder's parameters."""
    return {f"encoder.{name}": source for name, source in found.items()}


class Pair(NamedTuple):
    """How the families in the line of BART differ."""

    positions: Positions
    norms_before: bool = False  # and at the end of both; else after the sums
    norms_embeddings: bool = False
    has_logit_bias: bool = False
    scales: bool = False  # the embeddings, where the config does not say
    activation: str = "gelu"


def read_pair(config: Config, pair: Pair) -> DecoderSpec:
    """Encoder and decoder with LayerNorm and biases everywhere, and embeddings shared by all three ends."""
    refuse_unless(config, "tie_word_embeddings", True)
    refuse_unless(config, "normalize_before", pair.norms_before)
    refuse_unless(config, "add_final_layer_norm", pair.norms_before)
    refuse_unless(config, "normalize_embedding", pair.norms_embeddings)
    hidden_size = required(config, "d_model", int)
    num_heads = required(config, "decoder_attention_heads", int)
    if required(config, "encoder_attention_heads", int) != num_heads or hidden_size % num_heads:
        raise ModelConfigError(
            f"config.json: encoder_attention_heads {config['encoder_attention_heads']} and decoder_attention_heads "
            f"{num_heads} must be equal and divide d_model {hidden_size}"
        )
    norm = Norm("layer", eps=1e-5, has_bias=True)
    norms = Norms(before=norm) if pair.norms_before else Norms(after=norm)
    last = norm if pair.norms_before else None
    dim = hidden_size // num_heads
    attention = Attention(num_heads, num_heads, dim, scale=dim**-0.5, qkv_bias=True, out_bias=True)
    around = replace(attention, causal=False)
    activation = read_activation(config, "activation_function", pair.activation)

    def mlp(field: str) -> Mlp:
        return Mlp(required(config, field, int), activation, gated=False, up_bias=True, down_bias=True)

    embedding = Embedding(
        scale=hidden_size**0.5 if optional(config, "scale_embedding", pair.scales) else 1.0,
        positions=pair.positions,
        norm=norm if pair.norms_embeddings else None,
    )
    max_positions = required(config, "max_position_embeddings", int)
    reading = Layer(around, mlp("encoder_ffn_dim"), norms, norms)
    writing = Layer(attention, mlp("decoder_ffn_dim"), norms, norms, cross=around, cross_norms=norms)
    return DecoderSpec(
        vocab_size=required(config, "vocab_size", int),
        hidden_size=hidden_size,
        max_positions=max_positions,
        embedding=embedding,
        layers=(writing,) * required(config, "decoder_layers", int),
        head=Head(last, tied=True, bias=pair.has_logit_bias),
        encoder=Encoder(
            max_positions,
            embedding,
            (reading,) * required(config, "encoder_layers", int),
            last,
            shares_tokens=True,
        ),
    )


def pair_sources(spec: DecoderSpec) -> dict[str, Source]:
    """Where BART and its descendants keep their parameters."""
    found = _end_sources("decoder.") | of_encoder(_end_sources("encoder."))
    names = {name: f"encoder_attn.{name}_proj" for name in "qkv"} | {"o": "encoder_attn.out_proj"}
    found |= sources({f"cross.{name}": f"decoder.layers.{{layer}}.{module}" for name, module in names.items()})
    norm = "decoder.layers.{layer}.encoder_attn_layer_norm"
    found |= sources({f"cross_norm.{place}": norm for place in ("before", "after")})
    return found | {
        "embed.weight": Source("shared.weight"),
        "head.weight": Source("shared.weight"),
        "head.bias": Source("final_logits_bias", is_row=True),
    }


def _end_sources(end: str) -> dict[str, Source]:
    layer = end + "layers.{layer}."
    modules = {
        "positions": end + "embed_positions",
        "embed_norm": end + "layernorm_embedding",
        "o": layer + "self_attn.out_proj",
        "up": layer + "fc1",
        "down": layer + "fc2",
        "final_norm": end + "layer_norm",
    }
    modules |= {name: f"{layer}self_attn.{name}_proj" for name in "qkv"}
    for place in ("before", "after"):
        modules[f"attention_norm.{place}"] = layer + "self_attn_layer_norm"
        modules[f"mlp_norm.{place}"] = layer + "final_layer_norm"
    return sources(modules)


# Copies of the shared embeddings
PAIR_IGNORED = ("*embed_tokens.weight", "lm_head.weight")
