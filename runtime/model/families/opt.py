"""OPT: positions that begin at 2; its 350m has norms after the sums, and embeddings narrower than the model."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, Source, change_every_layer, optional, refuse_unless, sources
from shardray.runtime.model.families.gpt_like import Fields, read_gpt_like
from shardray.runtime.model.positions import Learned
from shardray.runtime.model.spec import DecoderSpec, Embedding, Norms

_FIELDS = Fields(mlp_size="ffn_dim", activation="activation_function")


def _read_config(config: Config) -> DecoderSpec:
    refuse_unless(config, "layer_norm_elementwise_affine", True)
    spec = read_gpt_like(config, _FIELDS, activation="relu")
    refuse_unless(config, "enable_bias", True)
    size = optional(config, "word_embed_proj_dim", spec.hidden_size)
    embedding = Embedding(size=None if size == spec.hidden_size else size, positions=Learned(spec.max_positions, 2))
    spec = replace(spec, embedding=embedding)
    before = optional(config, "do_layer_norm_before", True)
    if not before:
        norms = Norms(after=spec.head.norm)
        spec = change_every_layer(spec, attention_norms=norms, mlp_norms=norms)
    has_final = before and not optional(config, "_remove_final_layer_norm", False)
    return spec if has_final else replace(spec, head=replace(spec.head, norm=None))


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    layer = "decoder.layers.{layer}."
    modules = {f"{block}_norm.{place}": layer + name for block, name in _NORMS.items() for place in ("before", "after")}
    modules |= {name: f"{layer}self_attn.{name}_proj" for name in "qkv"}
    return sources(
        modules
        | {
            "embed": "decoder.embed_tokens",
            "embed_projection": "decoder.project_in",
            "positions": "decoder.embed_positions",
            "o": layer + "self_attn.out_proj",
            "up": layer + "fc1",
            "down": layer + "fc2",
            "final_norm": "decoder.final_layer_norm",
            "head_projection": "decoder.project_out",
            "head": "decoder.embed_tokens" if spec.head.tied else "lm_head",
        }
    )


_NORMS = {"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"}

OPT = Family(
    name="opt",
    model_types=("opt",),
    read_config=_read_config,
    sources=_sources,
    ignored=("lm_head.weight",),
    prefixes=("model.", ""),
    irrelevant={"_remove_final_layer_norm": "used with do_layer_norm_before alone"},
)
