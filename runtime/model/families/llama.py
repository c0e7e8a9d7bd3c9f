"""Llama 1 to 3.x and what shares its architecture: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardray.runtime.model.families.family import (
    Family,
    Source,
    choice,
    optional,
    refuse_unless,
    required,
    whole_parts,
)
from shardray.runtime.model.rotary import read_rotary
from shardray.runtime.model.spec import Activation, Attention, DecoderSpec, Mlp, Norm

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _read_config(config: Mapping[str, Any]) -> DecoderSpec:
    refuse_unless(config, "pretraining_tp", 1)
    hidden_size = required(config, "hidden_size", int)
    num_heads = required(config, "num_attention_heads", int)
    head_dim = optional(config, "head_dim", 0) or whole_parts(config, "hidden_size", "num_attention_heads")
    has_kv_heads = config.get("num_key_value_heads") is not None
    group = whole_parts(config, "num_attention_heads", "num_key_value_heads") if has_kv_heads else 1
    attention_bias, mlp_bias = optional(config, "attention_bias", False), optional(config, "mlp_bias", False)
    return DecoderSpec(
        vocab_size=required(config, "vocab_size", int),
        hidden_size=hidden_size,
        num_layers=required(config, "num_hidden_layers", int),
        max_positions=required(config, "max_position_embeddings", int),
        norm=Norm("rms", eps=optional(config, "rms_norm_eps", 1e-6)),
        positions=read_rotary(config, head_dim),
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads // group,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=attention_bias,
            out_bias=attention_bias,
        ),
        mlp=Mlp(
            size=required(config, "intermediate_size", int),
            activation=choice(config, "hidden_act", "silu", _ACTIVATIONS),
            gated=True,
            up_bias=mlp_bias,
            down_bias=mlp_bias,
        ),
        tied_embeddings=optional(config, "tie_word_embeddings", False),
    )


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "model.layers.{layer}."
    modules = {
        "embed": "model.embed_tokens",
        "attention_norm": layer + "input_layernorm",
        "q": layer + "self_attn.q_proj",
        "k": layer + "self_attn.k_proj",
        "v": layer + "self_attn.v_proj",
        "o": layer + "self_attn.o_proj",
        "mlp_norm": layer + "post_attention_layernorm",
        "gate": layer + "mlp.gate_proj",
        "up": layer + "mlp.up_proj",
        "down": layer + "mlp.down_proj",
        "final_norm": "model.norm",
        "head": "model.embed_tokens" if spec.tied_embeddings else "lm_head",
    }
    return {
        f"{module}.{part}": Source(f"{name}.{part}") for module, name in modules.items() for part in ("weight", "bias")
    }


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    read_config=_read_config,
    sources=_sources,
    ignored=("*.rotary_emb.inv_freq", "lm_head.weight"),
)
