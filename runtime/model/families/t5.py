"""T5, its version 1.1 (Flan-T5) and mT5: biases by distance instead of positions, RMSNorm, scores not scaled."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.encoder_like import of_encoder
from shardray.runtime.model.families.family import Family, Source, choice, optional, required, sources
from shardray.runtime.model.positions import Relative
from shardray.runtime.model.spec import (
    Activation,
    Attention,
    DecoderSpec,
    Embedding,
    Encoder,
    Head,
    Layer,
    Mlp,
    Norm,
    Norms,
)

_TRAINED_LEN = 512  # of those published; their configs of today do not say
_MLPS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
}


def _read_config(config: Config) -> DecoderSpec:
    is_first = config["model_type"] == "t5"
    hidden_size, num_heads = required(config, "d_model", int), required(config, "num_heads", int)
    norm = Norm("rms", eps=optional(config, "layer_norm_epsilon", 1e-6))
    relative = Relative(
        optional(config, "relative_attention_num_buckets", 32), optional(config, "relative_attention_max_distance", 128)
    )
    activation, gated = choice(config, "feed_forward_proj", "relu" if is_first else "gated-gelu", _MLPS)
    attention = Attention(num_heads, num_heads, required(config, "d_kv", int), scale=1.0)
    mlp, norms = Mlp(required(config, "d_ff", int), activation, gated), Norms(before=norm)
    writing = Layer(replace(attention, relative=relative), mlp, norms, norms)
    writing = replace(writing, cross=replace(attention, causal=False), cross_norms=norms)
    reading = Layer(replace(attention, causal=False, relative=relative), mlp, norms, norms)
    num_layers, max_positions = required(config, "num_layers", int), optional(config, "n_positions", _TRAINED_LEN)
    tied = optional(config, "tie_word_embeddings", True)
    is_scaled = optional(config, "scale_decoder_outputs", tied and is_first)
    return DecoderSpec(
        vocab_size=required(config, "vocab_size", int),
        hidden_size=hidden_size,
        max_positions=max_positions,
        embedding=Embedding(),
        layers=(writing,) * optional(config, "num_decoder_layers", num_layers),
        head=Head(norm, tied=tied, scale=hidden_size**-0.5 if is_scaled else 1.0),
        encoder=Encoder(max_positions, Embedding(), (reading,) * num_layers, norm, shares_tokens=True),
    )


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    found = of_encoder(_end_sources("encoder", spec)) | _end_sources("decoder", spec)
    cross = "decoder.block.{layer}.layer.1."
    found |= sources({f"cross.{name}": f"{cross}EncDecAttention.{name}" for name in "qkvo"})
    found |= sources({"cross_norm.before": cross + "layer_norm"})
    return found | sources({"embed": "shared", "head": "shared" if spec.head.tied else "lm_head"})


def _end_sources(end: str, spec: DecoderSpec) -> dict[str, Source]:
    """The MLP is the last block of a layer. The first layer has the biases by distance, for all."""
    attention, mlp = f"{end}.block.{{layer}}.layer.0.", f"{end}.block.{{layer}}.layer.{1 if end == 'encoder' else 2}."
    gated = spec.layers[0].dense.gated
    return sources(
        {name: f"{attention}SelfAttention.{name}" for name in "qkvo"}
        | {
            "relative": f"{end}.block.0.layer.0.SelfAttention.relative_attention_bias",
            "attention_norm.before": attention + "layer_norm",
            "mlp_norm.before": mlp + "layer_norm",
            "gate": mlp + "DenseReluDense.wi_0",
            "up": mlp + ("DenseReluDense.wi_1" if gated else "DenseReluDense.wi"),
            "down": mlp + "DenseReluDense.wo",
            "final_norm": f"{end}.final_layer_norm",
        }
    )


T5 = Family(
    name="t5",
    model_types=("t5", "mt5"),
    read_config=_read_config,
    sources=_sources,
    ignored=(
        "*embed_tokens.weight",
        "lm_head.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.*",
    ),
    irrelevant={"dense_act_fn": "follows from feed_forward_proj", "is_gated_act": "follows from feed_forward_proj"},
)
