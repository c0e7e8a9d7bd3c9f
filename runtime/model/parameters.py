"""The parameters that a DecoderSpec implies: their names, shapes, and the axis along which each is split.

Sharding is derived here once, for all families. Names are the runtime's own; a family maps them to a checkpoint's.

    embed.weight      (vocab, hidden)          split by vocabulary rows
    q.weight          (heads * dim, hidden)    split by query heads        column-parallel
    k.weight          (kv_heads * dim, hidden) split by KV heads
    o.weight          (hidden, heads * dim)    split by query heads        row-parallel
    gate/up.weight    (ffn, hidden)            split by FFN columns        column-parallel
    down.weight       (hidden, ffn)            split by FFN columns        row-parallel
    *.weight_scale    (rows of it, 1)          split as those rows are     of weights of 8 bits: see quantized.py
    norms, biases after a sum, positions       whole on every rank

Those of an encoder are told apart by ``encoder.`` before their names; those of cross-attention begin with ``cross.``.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from shardray.parallel.plan import INT8_GROUP, Axis, ModelSizes, ShardPlan
from shardray.runtime.model.positions import Learned
from shardray.runtime.model.spec import Attention, DecoderSpec, Embedding, Experts, Latent, Layer, Mlp, Norm

ENCODER, CROSS = "encoder.", "cross."  # what the names of such parameters begin with
SCALE = "_scale"  # and what those of scales end with, behind the name of what they scale


@dataclass(frozen=True)
class Split:
    """``dim`` is cut in units of ``unit`` elements; the plan says which units of ``axis`` a rank owns."""

    dim: int
    axis: Axis
    unit: int = 1


@dataclass(frozen=True)
class Parameter:
    """A whole parameter and how it is cut. ``multiplied``: it is read by a Linear and by nothing else.

    ``in_float32``, ``in_int8``: it is held so, whatever the model's dtype is.
    """

    shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()
    multiplied: bool = False
    in_float32: bool = False
    in_int8: bool = False

    @property
    def num_elements(self) -> int:
        """Of all ranks together."""
        return math.prod(self.shape)

    def owned(self, plan: ShardPlan, tp_rank: int) -> tuple[slice, ...]:
        """The slice of the whole parameter that a tensor rank owns."""
        index = [slice(0, size) for size in self.shape]
        for split in self.splits:
            units = plan.owned(split.axis, tp_rank, self.shape[split.dim] // split.unit)
            index[split.dim] = slice(units.start * split.unit, units.stop * split.unit)
        return tuple(index)

    def num_owned(self, plan: ShardPlan, tp_rank: int) -> int:
        """Elements of that slice."""
        return math.prod(part.stop - part.start for part in self.owned(plan, tp_rank))

    def item_bytes(self, of_model: int) -> int:
        """Of one element as it is held, where the model's dtype takes ``of_model``."""
        return 4 if self.in_float32 else 1 if self.in_int8 else of_model


def embedding_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """What the first stage holds besides its layers."""
    found = _embedding_parameters(spec, spec.embedding) if spec.layers else {}
    if spec.encoder is None:
        return found
    of_encoder = _embedding_parameters(spec, spec.encoder.embedding)
    if spec.encoder.shares_tokens:
        del of_encoder["embed.weight"]
    return found | _within(ENCODER, of_encoder)


def _embedding_parameters(spec: DecoderSpec, embedding: Embedding) -> dict[str, Parameter]:
    hidden = spec.hidden_size
    found = {"embed.weight": Parameter((spec.vocab_size, embedding.size or hidden), (Split(0, Axis.VOCAB),))}
    if embedding.size is not None:
        found["embed_projection.weight"] = Parameter((hidden, embedding.size))
    if isinstance(embedding.positions, Learned):
        rows = embedding.positions.num_positions + embedding.positions.offset
        found["positions.weight"] = Parameter((rows, hidden))
    if embedding.num_types:
        found["types.weight"] = Parameter((embedding.num_types, hidden))
    return found | _norm("embed_norm", embedding.norm, (hidden,))


def encoder_end_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """What the stage with the last layer of an encoder holds besides."""
    if spec.encoder is None:
        return {}
    return _within(ENCODER, _norm("final_norm", spec.encoder.norm, (spec.hidden_size,)))


def head_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """What the last stage holds besides its layers. A tied head is read from the embedding's rows."""
    if not spec.layers:
        return {}
    size = spec.embedding.size or spec.hidden_size
    found = _norm("final_norm", spec.head.norm, (spec.hidden_size,))
    if spec.embedding.size is not None:
        found["head_projection.weight"] = Parameter((size, spec.hidden_size))
    head = _linear("head", (spec.vocab_size, size), Split(0, Axis.VOCAB), spec.head.bias)
    return found | (_in_int8(head) if spec.head.in_int8 else head)


def layer_parameters(spec: DecoderSpec, layer: Layer) -> dict[str, Parameter]:
    """One layer's parameters."""
    found = _layer_parameters(spec, layer)
    return _in_int8(found) if spec.in_int8 else found


def _layer_parameters(spec: DecoderSpec, layer: Layer) -> dict[str, Parameter]:
    hidden = spec.hidden_size
    found: dict[str, Parameter] = {}
    for block, norms in (
        ("attention", layer.attention_norms), ("cross", layer.cross_norms), ("mlp", layer.mlp_norms),
    ):  # fmt: skip
        for place in ("before", "inner", "after"):
            found |= _norm(f"{block}_norm.{place}", getattr(norms, place), (hidden,))
    found |= _attention_parameters(layer.attention, hidden)
    if layer.cross is not None:
        found |= _within(CROSS, _attention_parameters(layer.cross, hidden))
    if isinstance(layer.mlp, Experts):
        return found | _expert_parameters(layer.mlp, hidden)
    return found | _mlp_parameters(layer.mlp, hidden)


@functools.lru_cache(maxsize=64)
def kind_parameters(spec: DecoderSpec, kind: int) -> Mapping[str, Parameter]:
    """Those of each layer of one of ``spec.layer_kinds``."""
    return MappingProxyType(layer_parameters(spec, spec.all_layers[kind]))


def _latent_parameters(attention: Attention, latent: Latent, hidden: int) -> dict[str, Parameter]:
    """The narrow vectors are made by every rank, what comes out of them by heads."""
    num_heads, dim, rotary_dim = attention.num_heads, attention.head_dim, attention.head_dim - latent.plain_dim
    found = {"kv_down.weight": Parameter((latent.kv_rank + rotary_dim, hidden), multiplied=True)}
    found |= _norm("kv_norm", latent.norm, (latent.kv_rank,))
    out_dim = latent.plain_dim + latent.value_dim
    found |= _linear("kv_up", (num_heads * out_dim, latent.kv_rank), Split(0, Axis.HEADS, out_dim), False)
    if latent.query_rank is not None:
        found["q_down.weight"] = Parameter((latent.query_rank, hidden), multiplied=True)
        found |= _norm("q_norm", latent.norm, (latent.query_rank,))
    found |= _linear("q", (num_heads * dim, latent.query_rank or hidden), Split(0, Axis.HEADS, dim), False)
    return found | _linear("o", (hidden, num_heads * latent.value_dim), Split(1, Axis.HEADS, latent.value_dim), False)


def _attention_parameters(attention: Attention, hidden: int) -> dict[str, Parameter]:
    if attention.latent is not None:
        return _latent_parameters(attention, attention.latent, hidden)
    dim, bias = attention.head_dim, attention.qkv_bias
    widths = {"q": attention.num_heads * dim, "k": attention.num_kv_heads * dim, "v": attention.num_kv_heads * dim}
    splits = {name: Split(0, Axis.HEADS if name == "q" else Axis.KV_HEADS, dim) for name in widths}
    found = _linear("o", (hidden, widths["q"]), Split(1, Axis.HEADS, dim), attention.out_bias)
    if attention.has_sinks:
        found["sinks"] = Parameter((attention.num_heads,), (Split(0, Axis.HEADS),))
    if attention.relative is not None:
        shape = attention.relative.num_buckets, attention.num_heads
        found["relative.weight"] = Parameter(shape, (Split(1, Axis.HEADS),))
    for name, width in widths.items():
        found |= _linear(name, (width, hidden), splits[name], bias)
    for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
        split, num_heads = splits[name], widths[name] // dim
        shapes = {"head": (dim,), "each": (num_heads, dim), "all": (num_heads * dim,)}
        cuts = {"head": (), "each": (Split(0, split.axis),), "all": (split,)}
        found |= _norm(f"{name}_norm", norm, shapes[attention.norm_over], *cuts[attention.norm_over])
    return found


def _mlp_parameters(mlp: Mlp, hidden: int, prefix: str = "") -> dict[str, Parameter]:
    found = _linear(f"{prefix}down", (hidden, mlp.size), Split(1, Axis.FFN), mlp.down_bias)
    for name, rows in _in_names(mlp).items():
        found |= _linear(f"{prefix}{name}", (rows * mlp.size, hidden), Split(0, Axis.FFN, rows), mlp.up_bias)
    return found


def _in_names(mlp: Mlp) -> dict[str, int]:
    """The matrices that read a token, and how many rows of each make a column of the MLP."""
    if mlp.gated and mlp.interleaved:
        return {"gate_up": 2}
    return {"gate": 1, "up": 1} if mlp.gated else {"up": 1}


def _expert_parameters(experts: Experts, hidden: int) -> dict[str, Parameter]:
    """Experts' matrices one after the other along the first dimension."""
    count, mlp = experts.num_experts, experts.mlp
    found = {"router.weight": Parameter((count, hidden))}
    if experts.router_bias:
        found["router.bias"] = Parameter((count,))
    if experts.has_correction:
        found["router.correction"] = Parameter((count,), in_float32=True)
    whole = Split(0, Axis.EXPERTS)
    for name, rows in _in_names(mlp).items():
        splits = whole, Split(1, Axis.EXPERT_FFN, rows)
        found[f"experts.{name}.weight"] = Parameter((count, rows * mlp.size, hidden), splits, True)
        if mlp.up_bias:
            found[f"experts.{name}.bias"] = Parameter((count, rows * mlp.size), splits)
    found["experts.down.weight"] = Parameter((count, hidden, mlp.size), (whole, Split(2, Axis.EXPERT_FFN)), True)
    if mlp.down_bias:
        found["experts.down.bias"] = Parameter((count, hidden), (whole,))
    if experts.shared is not None:
        found |= _mlp_parameters(experts.shared, hidden, "shared.")
    if experts.has_shared_gate:
        found["shared_gate.weight"] = Parameter((1, hidden))
    return found


def model_sizes(spec: DecoderSpec) -> ModelSizes:
    """The sizes that the shard plan splits; costs are parameters read per token."""
    costs = {layer: float(_num_elements(layer_parameters(spec, layer))) for layer in set(spec.all_layers)}
    return ModelSizes(
        num_heads=spec.attention.num_heads,
        num_kv_heads=spec.attention.num_kv_heads,
        vocab_size=spec.vocab_size,
        layer_costs=tuple(costs[layer] for layer in spec.all_layers),
        embed_cost=float(spec.hidden_size),
        head_cost=float(spec.vocab_size * spec.hidden_size) if spec.layers else 0.0,
        ffn_group=INT8_GROUP if spec.in_int8 else 1,
    )


def num_cached_layers(spec: DecoderSpec, plan: ShardPlan, stage: int) -> int:
    """Layers of a stage whose keys and values are kept: all but those of an encoder."""
    return sum(index >= spec.num_encoder_layers for index in plan.stages[stage])


@functools.lru_cache(maxsize=16)
def all_axes(spec: DecoderSpec) -> frozenset[tuple[Axis, int]]:
    """(axis, units of it) for every way in which some parameter is cut."""
    ends = embedding_parameters(spec), encoder_end_parameters(spec), head_parameters(spec)
    parts = *ends, *(kind_parameters(spec, kind) for kind in set(spec.layer_kinds))
    return frozenset(
        (split.axis, parameter.shape[split.dim] // split.unit)
        for part in parts
        for parameter in part.values()
        for split in parameter.splits
    )


def num_owned_elements(spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int) -> int:
    """Parameters that one rank holds. A head tied to an embedding on the same rank is held once."""
    return _total_owned(spec, plan, stage, tp_rank, lambda parameter: 1)


def num_owned_bytes(spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int, item_bytes: int) -> int:
    """What they take where the model's dtype takes ``item_bytes``."""
    return _total_owned(spec, plan, stage, tp_rank, lambda parameter: parameter.item_bytes(item_bytes))


def _total_owned(
    spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int, weigh: Callable[[Parameter], int]
) -> int:
    def total(parameters: Mapping[str, Parameter]) -> int:
        return sum(weigh(parameter) * parameter.num_owned(plan, tp_rank) for parameter in parameters.values())

    alike = Counter(spec.layer_kinds[index] for index in plan.stages[stage])
    of_layers = sum(count * total(kind_parameters(spec, kind)) for kind, count in alike.items())
    parts = []
    if spec.num_encoder_layers - 1 in plan.stages[stage]:
        parts.append(encoder_end_parameters(spec))
    if stage == 0:
        parts.append(embedding_parameters(spec))
    if stage == plan.pp_size - 1:
        head = head_parameters(spec)
        if stage == 0 and spec.head.tied:
            head.pop("head.weight", None)
        parts.append(head)
    return of_layers + sum(map(total, parts))


def num_copied_elements(spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int) -> int:
    """Parameters that one rank holds twice where products keep weights in a layout of their own: a tied head's."""
    if not (spec.layers and spec.head.tied and plan.pp_size == 1):
        return 0
    return head_parameters(spec)["head.weight"].num_owned(plan, tp_rank)


def _within(prefix: str, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    return {prefix + name: parameter for name, parameter in parameters.items()}


def _linear(name: str, shape: tuple[int, int], split: Split, bias: bool) -> dict[str, Parameter]:
    found = {f"{name}.weight": Parameter(shape, (split,), multiplied=True)}
    if bias:  # a split over the input leaves the bias whole: it is added once, after the sum
        found[f"{name}.bias"] = Parameter(shape[:1], (split,) if split.dim == 0 else ())
    return found


def _in_int8(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The same, with what a Linear reads in 8 bits, and the scales of its rows."""
    found = dict(parameters)
    for name, parameter in parameters.items():
        if parameter.multiplied:
            found[name] = replace(parameter, in_int8=True)
            rows = tuple(split for split in parameter.splits if split.dim < len(parameter.shape) - 1)
            found[name + SCALE] = Parameter((*parameter.shape[:-1], 1), rows, in_float32=True)
    return found


def _norm(name: str, norm: Norm | None, shape: tuple[int, ...], *splits: Split) -> dict[str, Parameter]:
    parts = {"weight": norm is not None and norm.has_weight, "bias": norm is not None and norm.has_bias}
    return {f"{name}.{part}": Parameter(shape, splits) for part, there in parts.items() if there}


def _num_elements(parameters: Mapping[str, Parameter]) -> int:
    return sum(parameter.num_elements for parameter in parameters.values())
