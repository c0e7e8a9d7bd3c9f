"""A model as data: one frozen description that the blocks, the loader and the shard plan all read.

A family turns a ``config.json`` into a DecoderSpec; nothing else in the runtime knows families apart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from shardray.runtime.model.positions import Positions, Relative, Rotary

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "clamped_swiglu"]


@dataclass(frozen=True)
class Norm:
    """``rms``: x / rms(x).  ``layer``: (x - mean) / std. Then ``* (offset + weight) + bias``; in float32."""

    kind: Literal["rms", "layer"]
    eps: float
    has_weight: bool = True
    has_bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Latent:
    """Queries, keys and values come out of narrow vectors (multi-head latent attention, arXiv 2405.04434).

    A head's query and key are ``plain_dim`` elements and then ``rotary.dim`` that are rotated; those of the keys are
    one vector for all heads. ``query_rank`` None: queries come straight from the hidden state.
    """

    query_rank: int | None
    kv_rank: int
    plain_dim: int
    value_dim: int
    norm: Norm


@dataclass(frozen=True)
class Attention:
    """Attention of a token to those up to itself (``causal``) or to all.

    num_kv_heads < num_heads is grouped-query, 1 is multi-query.

    ``alibi``: scores fall with distance by a slope per head (arXiv 2108.12409) times this. ``relative``: a bias by
    distance. ``window``: how many tokens a token sees, itself included; if it is not causal, to either side.
    ``softcap``: a score s becomes softcap * tanh(s / softcap).
    ``clip``: bounds of q, k, v, after their norms.
    ``q_norm`` and ``k_norm`` come before the rotation: over a ``head`` with one weight for all heads, with one for
    ``each``, or over ``all`` heads at once. ``has_sinks``: the softmax has one more score per head, of no token.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    rotary: Rotary | None = None
    alibi: float | None = None
    relative: Relative | None = None
    window: int | None = None
    softcap: float | None = None
    clip: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_over: Literal["head", "each", "all"] = "head"
    has_sinks: bool = False
    latent: Latent | None = None
    qkv_bias: bool = False
    out_bias: bool = False


@dataclass(frozen=True)
class Mlp:
    """``down(act(up(x)))``, or gated: ``down(act(gate(x)) * up(x))``.

    ``interleaved``: gate and up are one matrix, their rows in turns. ``clamped_swiglu`` is gpt-oss's own gate, which
    bounds both at 7, sharpens the sigmoid by 1.702 and adds 1 to up.
    """

    size: int
    activation: Activation
    gated: bool
    up_bias: bool = False
    down_bias: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Groups:
    """Experts in ``num_groups`` equal groups, ranked by the sum of their ``judges`` best scores; ``top_k`` remain."""

    num_groups: int
    top_k: int
    judges: int


@dataclass(frozen=True)
class Experts:
    """``top_k`` of many MLPs for each token, by a router's scores; their outputs are weighed and added.

    ``normalized``: the weights of those chosen add up to one, before they are multiplied by ``scale``. ``groups``: only
    experts of the best groups can be chosen. ``has_correction``: a bias on the scores, for the choice alone.
    ``shared``: an MLP for every token besides; with a gate, times sigmoid of a product of its own.
    ``routes_in_float32``: the router's product is computed so, whatever the model's dtype is.
    """

    num_experts: int
    top_k: int
    mlp: Mlp
    normalized: bool
    shared: Mlp | None = None
    has_shared_gate: bool = False
    router_bias: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    has_correction: bool = False
    routes_in_float32: bool = False
    groups: Groups | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Norms:
    """Where one block of a layer is normalized; None is nowhere.

    ``before``: what it reads. ``inner``: what it gives, before that is added to the residual. ``after``: the sum.
    """

    before: Norm | None = None
    inner: Norm | None = None
    after: Norm | None = None


@dataclass(frozen=True)
class Layer:
    """Attention, then MLP; or both from the same residual (``parallel``), where an MLP without a norm of its own reads
    what attention reads. ``cross``, between the two: attention to what the encoder gave. What each gives is multiplied
    by ``residual_scale`` before it is added.
    """

    attention: Attention
    mlp: Mlp | Experts
    attention_norms: Norms
    mlp_norms: Norms
    parallel: bool = False
    residual_scale: float = 1.0
    cross: Attention | None = None
    cross_norms: Norms = Norms()

    @property
    def dense(self) -> Mlp:
        """The MLP of a layer without experts."""
        assert isinstance(self.mlp, Mlp)
        return self.mlp


@dataclass(frozen=True)
class Embedding:
    """Token embeddings, times ``scale``, through a projection if they are ``size`` wide, plus positions, normalized.

    ``num_types``: of the kinds of text that have an embedding as well; all tokens are of the first.
    """

    scale: float = 1.0
    size: int | None = None
    positions: Positions | None = None
    num_types: int = 0
    norm: Norm | None = None


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: ``softcap(scale * (weight @ norm(x) + bias))``; ``tied`` to the embedding.

    ``in_int8``: the weight is held in 8 bits.
    """

    norm: Norm | None
    tied: bool
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    in_int8: bool = False


@dataclass(frozen=True)
class Encoder:
    """What reads a whole prompt at once; its hidden states, normalized, are what a decoder's ``cross`` attends to.

    ``shares_tokens``: its token embeddings are the decoder's.
    """

    max_positions: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    norm: Norm | None = None
    shares_tokens: bool = False


@dataclass(frozen=True)
class DecoderSpec:
    """Everything that distinguishes one model from another. Layers may differ, but not in heads or sizes.

    With an ``encoder`` the prompt is its to read; one without ``layers`` behind it gives embeddings instead of text,
    and ``embedding`` and ``head`` then mean nothing. ``in_int8``: what layers multiply with is held in 8 bits.
    """

    vocab_size: int
    hidden_size: int
    max_positions: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    encoder: Encoder | None = None
    in_int8: bool = False

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        """In the order in which pipeline stages share them out."""
        return self.layers if self.encoder is None else (*self.encoder.layers, *self.layers)

    @property
    def num_encoder_layers(self) -> int:
        return 0 if self.encoder is None else len(self.encoder.layers)

    def __hash__(self) -> int:
        """Of a few numbers: what is worked out of a specification is kept by it, and its layers take long to hash."""
        return hash((self.vocab_size, self.hidden_size, self.max_positions, len(self.layers)))

    @functools.cached_property
    def layer_kinds(self) -> tuple[int, ...]:
        """For each of ``all_layers`` the first one like it, of the same stack. Telling layers apart takes a while."""
        first: dict[tuple[bool, Layer], int] = {}
        stacked = ((index < self.num_encoder_layers, layer) for index, layer in enumerate(self.all_layers))
        return tuple(first.setdefault(kind, index) for index, kind in enumerate(stacked))

    @property
    def num_layers(self) -> int:
        return len(self.all_layers)

    @property
    def attention(self) -> Attention:
        """That of the first layer, for the sizes that all layers share."""
        return self.all_layers[0].attention

    @property
    def widest_mlp(self) -> int:
        """Columns that a token passes through in one layer, at most."""
        return max(_width(layer.mlp) for layer in self.all_layers)


def _width(mlp: Mlp | Experts) -> int:
    if isinstance(mlp, Mlp):
        return mlp.size
    return mlp.top_k * mlp.mlp.size + (mlp.shared.size if mlp.shared is not None else 0)


PoolingMode = Literal["mean", "cls", "last"]


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become its embedding: their mean, that of the first token (``cls``), or the last;
    ``normalize``: of length 1.
    """

    mode: PoolingMode = "mean"
    normalize: bool = False


class ModelConfigError(ValueError):
    """A config.json that describes something this runtime does not compute; names the field."""
