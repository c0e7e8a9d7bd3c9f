"""ModernBERT: rotary positions, windows to either side on most layers, gated GELU, no norm before the first layer."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.encoder_like import as_encoder, of_encoder
from shardray.runtime.model.families.family import (
    FULL,
    SLIDING,
    Family,
    Source,
    change_layers,
    change_mlp,
    fused_in_turn,
    layer_types,
    optional,
    read_activation,
    required,
    sources,
)
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.rotary import read_rotary, with_rotary_of
from shardray.runtime.model.spec import DecoderSpec, Embedding, Layer, Norm, Norms

_FIELDS = Fields(activation="hidden_activation", eps="norm_eps")


def _read_config(config: Config) -> DecoderSpec:
    spec = read_gpt_like(config, _FIELDS, bias=False, activation="gelu")
    norm = Norm("layer", optional(config, "norm_eps", 1e-5), has_bias=optional(config, "norm_bias", False))
    mlp_bias, attention_bias = optional(config, "mlp_bias", False), optional(config, "attention_bias", False)
    activation = read_activation(config, "hidden_activation", "gelu")
    spec = change_mlp(spec, gated=True, activation=activation, up_bias=mlp_bias, down_bias=mlp_bias)
    every = optional(config, "global_attn_every_n_layers", 3)
    kinds = layer_types(config, spec.num_layers, lambda index: index % every != 0)
    thetas = {
        SLIDING: optional(config, "local_rope_theta", 10_000.0),
        FULL: optional(config, "global_rope_theta", 160_000.0),
    }
    window = required(config, "local_attention", int) // 2 + 1

    def change(index: int, layer: Layer) -> Layer:
        kind = kinds[index]
        attention = replace(
            layer.attention,
            rotary=read_rotary(with_rotary_of(config, kind, thetas[kind]), layer.attention.head_dim),
            window=window if kind == SLIDING else None,
            qkv_bias=attention_bias,
            out_bias=attention_bias,
        )
        before = Norms(before=norm)
        return replace(layer, attention=attention, attention_norms=before if index else Norms(), mlp_norms=before)

    return as_encoder(change_layers(spec, change), Embedding(norm=norm), norm)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    assert spec.encoder is not None
    layer, mlp = "layers.{layer}.", spec.encoder.layers[0].dense
    found = sources(
        {
            "embed": "embeddings.tok_embeddings",
            "embed_norm": "embeddings.norm",
            "attention_norm.before": layer + "attn_norm",
            "o": layer + "attn.Wo",
            "mlp_norm.before": layer + "mlp_norm",
            "gate": layer + "mlp.Wi",
            "down": layer + "mlp.Wo",
            "final_norm": "final_norm",
        }
    )
    found |= {f"up.{part}": Source(f"{layer}mlp.Wi.{part}", start=mlp.size) for part in ("weight", "bias")}
    return of_encoder(found | fused_in_turn(spec, layer + "attn.Wqkv"))


MODERNBERT = Family(
    name="modernbert",
    model_types=("modernbert",),
    read_config=_read_config,
    sources=_sources,
    ignored=("head.*", "decoder.*", "classifier.*"),
    prefixes=("model.", ""),
)
