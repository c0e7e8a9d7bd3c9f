"""docs/models.md, made from the families and the tests' checkpoints: ``python -m tests.model.models_page``."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CONFIG_MAPPING

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families import FAMILIES
from shardray.runtime.model.families.family import Family
from shardray.runtime.model.families.irrelevant import IRRELEVANT
from shardray.runtime.model.positions import Learned, Rotary, Sinusoidal
from shardray.runtime.model.spec import Attention, DecoderSpec, Experts, Latent, Layer, Mlp, Norm, Norms
from tests.model.encoder_zoo import ENCODERS, PAIRS
from tests.model.zoo import ZOO

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
_HEAD = """# Models

Every family is a small file in `runtime/model/families/`: from its `config.json` to a spec (`runtime/model/spec.py`),
and from the names in its checkpoints to parameters. What a family needs is a word of the spec, and the blocks know each
word once; no family has a forward pass of its own.

Checked for everything under "Checked": float32 logits of prefills in chunks and of 24 decodes (or embeddings) within
2e-4 of those of `transformers`, greedy tokens equal to its own on tensor × pipeline shapes with requests of unlike
lengths and a preemption, and that a rank reads the bytes of what it owns and no more (`tests/model/test_zoo.py`,
`tests/model/test_encoders.py`, `tests/engine/test_family_shapes.py`, `tests/engine/test_encoder_shapes.py`). The
checkpoints are tiny and random; their shapes divide nothing evenly.

An unknown `model_type`, or an unknown value of a field, is refused before any weight is read, with the nearest one that
is known. Every field of each configuration is either read, or listed below as irrelevant; a field of neither kind is
named in the log.

Every family is also served with weights of 8 bits ([operations.md](operations.md#weights-of-8-bits),
`tests/model/test_quantize.py`).

This page is made by `python -m tests.model.models_page`.
"""


def configs(family: Family) -> dict[str, Config]:
    """The variants of a family that tests check, as their ``config.json`` says them."""
    found = {
        name: Config(json.loads(CONFIG_MAPPING[model_type](**fields).to_json_string(use_diff=False)))
        for name, (model_type, fields) in (ZOO | ENCODERS | PAIRS).items()
        if model_type in family.model_types
    }
    for config in found.values():
        assert config["model_type"] in family.model_types  # which the caller of read_config has read
    return found


def page() -> str:
    parts = [_HEAD]
    for title, wanted in (
        ("Decoders", lambda spec: spec.encoder is None),
        ("Encoder and decoder", lambda spec: spec.encoder is not None and bool(spec.layers)),
        ("Encoders", lambda spec: not spec.layers),
    ):
        sections = [_section(family, *found) for family, found in _found().items() if wanted(found[0][0])]
        parts += [f"## {title}\n", *sections]
    parts.append("## Fields that make no difference to any family\n")
    by_reason: dict[str, list[str]] = {}
    for field, reason in IRRELEVANT.items():
        by_reason.setdefault(reason, []).append(field)
    parts += [f"* {reason}: {_code(sorted(fields))}" for reason, fields in by_reason.items()]
    return "\n".join(parts) + "\n"


def _found() -> dict[Family, tuple[list[DecoderSpec], list[str], set[str]]]:
    """For each family the specs and names of its variants, and the fields that were read for them."""
    found = {}
    for family in FAMILIES:
        variants = configs(family)
        specs = [family.read_config(config) for config in variants.values()]
        read = {field for config in variants.values() for field in config.read if field in config}
        found[family] = specs, list(variants), read
    return found


def _section(family: Family, specs: list[DecoderSpec], names: list[str], read: set[str]) -> str:
    words = dict.fromkeys(word for spec in specs for word in _words(spec))
    reasons = "".join(f" `{field}` makes no difference: {reason}." for field, reason in family.irrelevant.items())
    return (
        f"### {family.name}\n\n`model_type` {_code(family.model_types)}. {'; '.join(words)}.\n\n"
        f"Fields: {_code(sorted(read - {'model_type'}))}.{reasons}\n\nChecked: {'; '.join(names)}.\n"
    )


def _words(spec: DecoderSpec) -> list[str]:
    """What a spec says, in the field's words."""
    embedding = spec.embedding if spec.encoder is None else spec.encoder.embedding
    words = []
    if isinstance(embedding.positions, Learned):
        offset = embedding.positions.offset
        words.append("learned positions" + f" from {offset} on" * bool(offset))
    if isinstance(embedding.positions, Sinusoidal):
        words.append("sinusoidal positions")
    for layer in dict.fromkeys(spec.all_layers):
        words += [*_attention_words(layer.attention), *_norm_words(layer), *_mlp_words(layer.mlp)]
        words += ["cross-attention"] * (layer.cross is not None)
        words += ["scaled residuals"] * (layer.residual_scale != 1.0)
    words += ["norm on the embeddings"] * (embedding.norm is not None)
    words += ["scaled embeddings"] * (embedding.scale != 1.0)
    words += ["narrow embeddings"] * (embedding.size is not None)
    if spec.layers:
        words.append("tied head" if spec.head.tied else "head of its own")
        words += ["capped logits"] * (spec.head.softcap is not None) + ["scaled logits"] * (spec.head.scale != 1.0)
    return words


def _attention_words(attention: Attention) -> list[str]:
    words = [_rotary_word(attention.rotary, attention)] if attention.rotary is not None else []
    words += ["ALiBi"] * (attention.alibi is not None) + ["relative bias in buckets"] * (attention.relative is not None)
    if isinstance(attention.latent, Latent):
        words.append("latent attention")
    elif attention.num_kv_heads == 1 and attention.num_heads > 1:
        words.append("multi-query attention")
    else:
        words.append(
            "multi-head attention" if attention.num_kv_heads == attention.num_heads else "grouped-query attention"
        )
    words += ["windows"] * (attention.window is not None) + ["capped scores"] * (attention.softcap is not None)
    words += ["sinks"] * attention.has_sinks + ["clipped projections"] * (attention.clip is not None)
    if attention.q_norm is not None:
        words.append({"head": "q/k norms", "each": "q/k norms of each head", "all": "q/k norms over all heads"}[
            attention.norm_over
        ])  # fmt: skip
    return words


def _rotary_word(rotary: Rotary, attention: Attention) -> str:
    word = "rotary positions"
    if rotary.dim < attention.head_dim and attention.latent is None:
        word = "partial " + word
    if rotary.interleaved:
        word += " in pairs side by side"
    return (
        word if rotary.scaling is None else f"{word}, {type(rotary.scaling).__name__.removesuffix('Scaling').lower()}"
    )


def _norm_words(layer: Layer) -> list[str]:
    norms = layer.attention_norms
    norm: Norm | None = norms.before or norms.inner or norms.after
    if norm is None:
        return []
    kind = "RMSNorm" if norm.kind == "rms" else "LayerNorm"
    return [f"{kind} {_places(norms)}", *["parallel blocks"] * layer.parallel]


def _places(norms: Norms) -> str:
    places = {"before": norms.before, "inner": norms.inner, "after": norms.after}
    named = {"before": "before a block", "inner": "behind a block", "after": "after the sum"}
    return " and ".join(named[place] for place, norm in places.items() if norm is not None)


def _mlp_words(mlp: Mlp | Experts) -> list[str]:
    if isinstance(mlp, Mlp):
        return [("gated " if mlp.gated else "") + mlp.activation]
    words = [f"experts ({mlp.scores})", *_mlp_words(mlp.mlp)]
    words += ["shared experts"] * (mlp.shared is not None) + ["groups of experts"] * (mlp.groups is not None)
    return words


def _code(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
