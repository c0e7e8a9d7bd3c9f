"""Most ranks of a mesh are alike: as many layers of each kind, blocks as long. What one takes, all of them take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.parameters import all_axes
from shardray.runtime.model.spec import DecoderSpec


def first_alike_stages(spec: DecoderSpec, plan: ShardPlan) -> list[int]:
    """For each stage the first one like it, which may be itself: the same kinds of layers, and the same ends."""
    return _first_alike(
        (
            tuple(Counter(spec.layer_kinds[index] for index in layers).items()),
            stage == 0,
            stage == plan.pp_size - 1,
            spec.num_encoder_layers - 1 in layers,
        )
        for stage, layers in enumerate(plan.stages)
    )


def first_alike_ranks(spec: DecoderSpec, plan: ShardPlan) -> list[int]:
    """For each tensor rank the first one like it, which may be itself: blocks as long, of every axis that is cut."""
    axes = all_axes(spec)
    return _first_alike(
        (
            len(plan.heads[tp_rank]),
            len(plan.kv_heads[tp_rank]),
            *(len(plan.owned(axis, tp_rank, count)) for axis, count in axes),
        )
        for tp_rank in range(plan.tp_size)
    )


def _first_alike(kinds: Iterable[Hashable]) -> list[int]:
    first: dict[Hashable, int] = {}
    return [first.setdefault(kind, index) for index, kind in enumerate(kinds)]
