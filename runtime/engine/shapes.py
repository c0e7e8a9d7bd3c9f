"""The shapes that a number of hosts can take, and what decides between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from shardray.parallel.plan import ShardPlan, make_plan
from shardray.runtime.model.alike import first_alike_ranks, first_alike_stages
from shardray.runtime.model.parameters import model_sizes, num_owned_elements
from shardray.runtime.model.spec import DecoderSpec


def shapes_within(max_hosts: int, num_layers: int) -> list[tuple[int, int]]:
    """Every (tensor ranks, stages) that takes at most ``max_hosts`` hosts; a stage has at least one layer."""
    return [
        (tp_size, pp_size)
        for tp_size in range(1, max_hosts + 1)
        for pp_size in range(1, min(max_hosts // tp_size, num_layers) + 1)
    ]


def cut(spec: DecoderSpec, tp_size: int, pp_size: int, expert_parallel: bool) -> ShardPlan:
    """An even cut. Raises PlanError."""
    return make_plan(model_sizes(spec), tp_size, pp_size, expert_parallel=expert_parallel)


class Cut(Protocol):
    """What a serving file or an assignment says of the cut."""

    @property
    def tp_size(self) -> int: ...
    @property
    def pp_size(self) -> int: ...
    @property
    def tensor_split(self) -> Sequence[float] | None: ...
    @property
    def stage_layers(self) -> Sequence[int] | None: ...
    @property
    def expert_parallel(self) -> bool: ...


def cut_as_configured(spec: DecoderSpec, parallel: Cut) -> ShardPlan:
    """The cut that ``parallel`` asks for. Raises PlanError."""
    return make_plan(
        model_sizes(spec), parallel.tp_size, parallel.pp_size,
        parallel.tensor_split, parallel.stage_layers, parallel.expert_parallel,
    )  # fmt: skip


def merit(spec: DecoderSpec, plan: ShardPlan) -> tuple[int, int, int]:
    """Less is better: more hosts, then the smaller largest share of the weights, then fewer stages."""
    return -plan.tp_size * plan.pp_size, _largest_share(spec, plan), plan.pp_size


def _largest_share(spec: DecoderSpec, plan: ShardPlan) -> int:
    """Parameters on the rank that holds most."""
    places = itertools.product({*first_alike_stages(spec, plan)}, {*first_alike_ranks(spec, plan)})
    return max(num_owned_elements(spec, plan, *place) for place in places)
