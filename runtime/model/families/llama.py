"""Llama 1 to 3.x: RMSNorm, rotary positions, SwiGLU, grouped-query attention. Most later families vary this one."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Source,
    optional,
    read_activation,
    refuse_unless,
    required,
    sources,
    whole_parts,
)
from shardray.runtime.model.rotary import longest_context, read_rotary
from shardray.runtime.model.spec import Attention, DecoderSpec, Embedding, Head, Layer, Mlp, Norm, Norms

LAYER = "model.layers.{layer}."


def read_llama_like(config: Config, norm: Norm | None = None, tied: bool = False) -> DecoderSpec:
    """A Llama of the config's sizes. ``norm`` replaces its RMSNorm; ``tied`` is the family's default."""
    attention_bias, mlp_bias = optional(config, "attention_bias", False), optional(config, "mlp_bias", False)
    num_heads = required(config, "num_attention_heads", int)
    head_dim = optional(config, "head_dim", 0) or whole_parts(config, "hidden_size", "num_attention_heads")
    has_kv_heads = config.get("num_key_value_heads") is not None
    group = whole_parts(config, "num_attention_heads", "num_key_value_heads") if has_kv_heads else 1
    rotary = read_rotary(config, head_dim)
    norm = norm or Norm("rms", eps=optional(config, "rms_norm_eps", 1e-6))
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads // group,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rotary=rotary,
            qkv_bias=attention_bias,
            out_bias=attention_bias,
        ),
        mlp=Mlp(
            size=required(config, "intermediate_size", int),
            activation=read_activation(config, "hidden_act", "silu"),
            gated=True,
            up_bias=mlp_bias,
            down_bias=mlp_bias,
        ),
        attention_norms=Norms(before=norm),
        mlp_norms=Norms(before=norm),
    )
    return DecoderSpec(
        vocab_size=required(config, "vocab_size", int),
        hidden_size=required(config, "hidden_size", int),
        max_positions=longest_context(rotary, required(config, "max_position_embeddings", int)),
        embedding=Embedding(),
        layers=(layer,) * required(config, "num_hidden_layers", int),
        head=Head(norm, tied=optional(config, "tie_word_embeddings", tied)),
    )


def llama_like_sources(spec: DecoderSpec, **modules: str) -> dict[str, Source]:
    """Where a Llama keeps its parameters, and its descendants the norms that they add.

    ``modules`` are kept elsewhere in a layer; a "__" in their names stands for a dot.
    """
    return sources(
        {
            "embed": "model.embed_tokens",
            "attention_norm.before": LAYER + "input_layernorm",
            "q": LAYER + "self_attn.q_proj",
            "k": LAYER + "self_attn.k_proj",
            "v": LAYER + "self_attn.v_proj",
            "q_norm": LAYER + "self_attn.q_norm",
            "k_norm": LAYER + "self_attn.k_norm",
            "o": LAYER + "self_attn.o_proj",
            "attention_norm.inner": LAYER + "post_attention_layernorm",
            "mlp_norm.before": LAYER + "post_attention_layernorm",
            "gate": LAYER + "mlp.gate_proj",
            "up": LAYER + "mlp.up_proj",
            "down": LAYER + "mlp.down_proj",
            "mlp_norm.inner": LAYER + "post_feedforward_layernorm",
            "final_norm": "model.norm",
            "head": "model.embed_tokens" if spec.head.tied else "lm_head",
        }
        | {name.replace("__", "."): LAYER + module for name, module in modules.items()}
    )


def _read_config(config: Config) -> DecoderSpec:
    refuse_unless(config, "pretraining_tp", 1)
    return read_llama_like(config)


LLAMA_IGNORED = ("*.rotary_emb.inv_freq", "lm_head.weight")

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    read_config=_read_config,
    sources=llama_like_sources,
    ignored=LLAMA_IGNORED,
)
