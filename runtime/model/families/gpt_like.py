"""What the families in the line of GPT-2 share: LayerNorm, GELU, every head its own keys, learned positions or none."""

from __future__ import annotations

from typing import NamedTuple

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import optional, read_activation, required
from shardray.runtime.model.positions import Learned
from shardray.runtime.model.spec import (
    Attention,
    DecoderSpec,
    Embedding,
    Head,
    Layer,
    Mlp,
    ModelConfigError,
    Norm,
    Norms,
)


class Fields(NamedTuple):
    """What a family calls the fields of its config."""

    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    mlp_size: str = "intermediate_size"
    max_positions: str = "max_position_embeddings"
    activation: str = "hidden_act"
    eps: str = "layer_norm_eps"


OLD = Fields("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "activation_function", "layer_norm_epsilon")


def read_gpt_like(
    config: Config, fields: Fields, bias: bool = True, tied: bool = True, positions: bool = False,
    activation: str = "gelu_new",
) -> DecoderSpec:  # fmt: skip
    """A decoder of the config's sizes, with ``bias`` everywhere or nowhere. The rest are the family's defaults."""
    hidden_size, num_heads = required(config, fields.hidden_size, int), required(config, fields.num_heads, int)
    if hidden_size % num_heads:
        raise ModelConfigError(
            f"config.json: {fields.hidden_size} {hidden_size} is not a multiple of {fields.num_heads} {num_heads}"
        )
    norm = Norm("layer", eps=optional(config, fields.eps, 1e-5), has_bias=bias)
    max_positions = required(config, fields.max_positions, int)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            scale=(hidden_size // num_heads) ** -0.5,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=Mlp(
            size=optional(config, fields.mlp_size, 4 * hidden_size),
            activation=read_activation(config, fields.activation, activation),
            gated=False,
            up_bias=bias,
            down_bias=bias,
        ),
        attention_norms=Norms(before=norm),
        mlp_norms=Norms(before=norm),
    )
    return DecoderSpec(
        vocab_size=required(config, "vocab_size", int),
        hidden_size=hidden_size,
        max_positions=max_positions,
        embedding=Embedding(positions=Learned(max_positions) if positions else None),
        layers=(layer,) * required(config, fields.num_layers, int),
        head=Head(norm, tied=optional(config, "tie_word_embeddings", tied)),
    )
