"""GPT-J and CodeGen: attention and MLP side by side behind one norm, pairs of neighbours rotated, a biased head."""

from __future__ import annotations

from dataclasses import replace

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import (
    Family,
    Groups,
    Source,
    change_attention,
    change_every_layer,
    optional,
    sources,
)
from shardray.runtime.model.families.gpt2 import GPT_IGNORED, gpt_sources
from shardray.runtime.model.families.gpt_like import OLD, read_gpt_like
from shardray.runtime.model.positions import Rotary
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError, Norms

_CODEGEN_BLOCKS = 4  # the fused projection was cut for as many devices: q, v, k of each after one another


def _read_config(config: Config) -> DecoderSpec:
    spec = read_gpt_like(config, OLD, tied=False)
    dim = optional(config, "rotary_dim", 64)
    rotary = Rotary(10_000.0, dim, interleaved=True)
    spec = change_attention(spec, qkv_bias=False, out_bias=False, rotary=rotary)
    spec = change_every_layer(spec, parallel=True, mlp_norms=Norms())
    return replace(spec, head=replace(spec.head, bias=True))


def _read_codegen(config: Config) -> DecoderSpec:
    spec = _read_config(config)
    if spec.attention.num_heads % _CODEGEN_BLOCKS:
        raise ModelConfigError(f"config.json: n_head {spec.attention.num_heads} is not a multiple of {_CODEGEN_BLOCKS}")
    return spec


def _modules(spec: DecoderSpec) -> dict[str, Source]:
    layer = "h.{layer}."
    modules = {"o": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"}
    modules |= {name: f"attn.{name}_proj" for name in "qkv"}
    head = sources({"head": "lm_head"})
    return gpt_sources(spec) | sources({name: layer + module for name, module in modules.items()}) | head


def _codegen_sources(spec: DecoderSpec) -> dict[str, Source]:
    rows = spec.attention.num_heads * spec.attention.head_dim // _CODEGEN_BLOCKS
    fused = {
        f"{name}.weight": Source("h.{layer}.attn.qkv_proj.weight", start=place * rows, groups=Groups(rows, 3 * rows))
        for place, name in enumerate("qvk")
    }
    return _modules(spec) | fused


GPTJ = Family(
    name="gpt-j",
    model_types=("gptj",),
    read_config=_read_config,
    sources=_modules,
    ignored=GPT_IGNORED,
    prefixes=("transformer.", ""),
)
CODEGEN = Family(
    name="codegen",
    model_types=("codegen",),
    read_config=_read_codegen,
    sources=_codegen_sources,
    ignored=GPT_IGNORED,
    prefixes=("transformer.", ""),
    irrelevant={"n_ctx": "the window is n_positions"},
)
