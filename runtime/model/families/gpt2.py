"""GPT-2: LayerNorm, learned positions, GELU, biases, and a fused qkv matrix that is stored transposed."""

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
from shardray.runtime.model.spec import Activation, Attention, DecoderSpec, Learned, Mlp, Norm

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def _read_config(config: Mapping[str, Any]) -> DecoderSpec:
    refuse_unless(config, "scale_attn_by_inverse_layer_idx", False)
    refuse_unless(config, "add_cross_attention", False)
    hidden_size = required(config, "n_embd", int)
    num_heads = required(config, "n_head", int)
    head_dim = whole_parts(config, "n_embd", "n_head")
    num_positions = required(config, "n_positions", int)
    return DecoderSpec(
        vocab_size=required(config, "vocab_size", int),
        hidden_size=hidden_size,
        num_layers=required(config, "n_layer", int),
        max_positions=num_positions,
        norm=Norm("layer", eps=optional(config, "layer_norm_epsilon", 1e-5)),
        positions=Learned(num_positions),
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if optional(config, "scale_attn_weights", True) else 1.0,
            qkv_bias=True,
            out_bias=True,
        ),
        mlp=Mlp(
            size=optional(config, "n_inner", 4 * hidden_size),
            activation=choice(config, "activation_function", "gelu_new", _ACTIVATIONS),
            gated=False,
            up_bias=True,
            down_bias=True,
        ),
        tied_embeddings=optional(config, "tie_word_embeddings", True),
    )


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer, hidden = "h.{layer}.", spec.hidden_size
    norms = {"attention_norm": layer + "ln_1", "mlp_norm": layer + "ln_2", "final_norm": "ln_f"}
    linears = {"o": layer + "attn.c_proj", "up": layer + "mlp.c_fc", "down": layer + "mlp.c_proj"}
    found = {
        "embed.weight": Source("wte.weight"),
        "positions.weight": Source("wpe.weight"),
        "head.weight": Source("wte.weight" if spec.tied_embeddings else "lm_head.weight"),
    }
    for module, name in norms.items():
        found |= {f"{module}.{part}": Source(f"{name}.{part}") for part in ("weight", "bias")}
    for module, name in linears.items():
        found |= {
            f"{module}.weight": Source(f"{name}.weight", transposed=True),
            f"{module}.bias": Source(f"{name}.bias"),
        }
    for index, module in enumerate("qkv"):
        start = index * hidden
        found[f"{module}.weight"] = Source(layer + "attn.c_attn.weight", transposed=True, start=start)
        found[f"{module}.bias"] = Source(layer + "attn.c_attn.bias", start=start)
    return found


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    read_config=_read_config,
    sources=_sources,
    ignored=("*.attn.bias", "*.attn.masked_bias", "lm_head.weight"),
    prefixes=("transformer.", ""),
)
