"""The parameters that a DecoderSpec implies: their names, shapes, and the axis along which each is split.

Sharding is derived here once, for all families. Names are the runtime's own; a family maps them to a checkpoint's.

    embed.weight      (vocab, hidden)          split by vocabulary rows
    q.weight          (heads * dim, hidden)    split by query heads        column-parallel
    k.weight          (kv_heads * dim, hidden) split by KV heads
    o.weight          (hidden, heads * dim)    split by query heads        row-parallel
    gate/up.weight    (ffn, hidden)            split by FFN columns        column-parallel
    down.weight       (hidden, ffn)            split by FFN columns        row-parallel
    norms, biases after a sum, positions       whole on every rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardray.parallel.plan import Axis, ModelSizes, ShardPlan
from shardray.runtime.model.spec import DecoderSpec, Learned


@dataclass(frozen=True)
class Split:
    """``dim`` is cut in units of ``unit`` elements; the plan says which units of ``axis`` a rank owns."""

    dim: int
    axis: Axis
    unit: int = 1


@dataclass(frozen=True)
class Parameter:
    """A whole parameter and how it is cut."""

    shape: tuple[int, ...]
    split: Split | None = None

    def owned(self, plan: ShardPlan, tp_rank: int) -> tuple[slice, ...]:
        """The slice of the whole parameter that a tensor rank owns."""
        index = [slice(0, size) for size in self.shape]
        if self.split is not None:
            units = plan.owned(self.split.axis, tp_rank)
            index[self.split.dim] = slice(units.start * self.split.unit, units.stop * self.split.unit)
        return tuple(index)


def embedding_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """What the first stage holds besides its layers."""
    found = {"embed.weight": Parameter((spec.vocab_size, spec.hidden_size), Split(0, Axis.VOCAB))}
    if isinstance(spec.positions, Learned):
        rows = spec.positions.num_positions + spec.positions.offset
        found["positions.weight"] = Parameter((rows, spec.hidden_size))
    return found


def head_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """What the last stage holds besides its layers. A tied head is read from the embedding's rows."""
    head = Parameter((spec.vocab_size, spec.hidden_size), Split(0, Axis.VOCAB))
    return {**_norm("final_norm", spec), "head.weight": head}


def layer_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """One layer's parameters."""
    attention, mlp, hidden = spec.attention, spec.mlp, spec.hidden_size
    dim = attention.head_dim
    heads, kv_heads = Split(0, Axis.HEADS, dim), Split(0, Axis.KV_HEADS, dim)
    found = {
        **_norm("attention_norm", spec),
        **_linear("q", (attention.num_heads * dim, hidden), heads, attention.qkv_bias),
        **_linear("k", (attention.num_kv_heads * dim, hidden), kv_heads, attention.qkv_bias),
        **_linear("v", (attention.num_kv_heads * dim, hidden), kv_heads, attention.qkv_bias),
        **_linear("o", (hidden, attention.num_heads * dim), Split(1, Axis.HEADS, dim), attention.out_bias),
        **_norm("mlp_norm", spec),
        **_linear("up", (mlp.size, hidden), Split(0, Axis.FFN), mlp.up_bias),
        **_linear("down", (hidden, mlp.size), Split(1, Axis.FFN), mlp.down_bias),
    }
    if mlp.gated:
        found |= _linear("gate", (mlp.size, hidden), Split(0, Axis.FFN), mlp.up_bias)
    return found


def model_sizes(spec: DecoderSpec) -> ModelSizes:
    """The sizes that the shard plan splits; costs are parameters read per token."""
    layer_cost = float(sum(_num_elements(parameter) for parameter in layer_parameters(spec).values()))
    return ModelSizes(
        num_heads=spec.attention.num_heads,
        num_kv_heads=spec.attention.num_kv_heads,
        ffn_size=spec.mlp.size,
        vocab_size=spec.vocab_size,
        layer_costs=(layer_cost,) * spec.num_layers,
        embed_cost=float(spec.hidden_size),
        head_cost=float(spec.vocab_size * spec.hidden_size),
    )


def num_owned_elements(spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int) -> int:
    """Parameters that one rank holds. A head tied to an embedding on the same rank is held once."""
    layers = layer_parameters(spec)
    parts = [layers] * len(plan.stages[stage])
    if stage == 0:
        parts.append(embedding_parameters(spec))
    if stage == plan.pp_size - 1:
        head = head_parameters(spec)
        if stage == 0 and spec.tied_embeddings:
            del head["head.weight"]
        parts.append(head)
    return sum(_num_owned(parameter, plan, tp_rank) for part in parts for parameter in part.values())


def _linear(name: str, shape: tuple[int, int], split: Split, bias: bool) -> dict[str, Parameter]:
    found = {f"{name}.weight": Parameter(shape, split)}
    if bias:  # a split over the input leaves the bias whole: it is added once, after the sum
        found[f"{name}.bias"] = Parameter(shape[:1], split if split.dim == 0 else None)
    return found


def _norm(name: str, spec: DecoderSpec) -> dict[str, Parameter]:
    found = {f"{name}.weight": Parameter((spec.hidden_size,))}
    if spec.norm.kind == "layer":
        found[f"{name}.bias"] = Parameter((spec.hidden_size,))
    return found


def _num_owned(parameter: Parameter, plan: ShardPlan, tp_rank: int) -> int:
    return math.prod(part.stop - part.start for part in parameter.owned(plan, tp_rank))


def _num_elements(parameter: Parameter) -> int:
    return math.prod(parameter.shape)
