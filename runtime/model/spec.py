"""A decoder as data: one frozen description that the blocks, the loader and the shard plan all read.

A family turns a ``config.json`` into a DecoderSpec; nothing else in the runtime knows families apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Norm:
    """``rms``: x / rms(x) * weight.  ``layer``: (x - mean) / std * weight + bias. Computed in float32."""

    kind: Literal["rms", "layer"]
    eps: float


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by ``factor``, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnScaling:
    """NTK-by-parts interpolation with attention scaling (YaRN, arXiv 2309.00071)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (arXiv 2104.09864): halves of the first ``dim`` elements of each head are rotated."""

    theta: float
    dim: int
    scaling: Scaling | None = None


@dataclass(frozen=True)
class Learned:
    """A learned embedding per position, added to the token's."""

    num_positions: int
    offset: int = 0


@dataclass(frozen=True)
class Attention:
    """Causal self-attention; num_kv_heads < num_heads is grouped-query, 1 is multi-query."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    out_bias: bool


@dataclass(frozen=True)
class Mlp:
    """``down(act(up(x)))``, or gated: ``down(act(gate(x)) * up(x))``."""

    size: int
    activation: Activation
    gated: bool
    up_bias: bool
    down_bias: bool


@dataclass(frozen=True)
class DecoderSpec:
    """Everything that distinguishes one decoder from another."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    norm: Norm
    positions: Rotary | Learned
    attention: Attention
    mlp: Mlp
    tied_embeddings: bool


class ModelConfigError(ValueError):
    """A config.json that describes something this runtime does not compute; names the field."""
