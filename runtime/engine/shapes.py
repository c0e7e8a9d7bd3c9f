"""The shapes that a number of hosts can take, and what decides between them."""

from __future__ import annotations

from shardray.parallel.plan import ShardPlan, make_plan
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


def largest_share(spec: DecoderSpec, plan: ShardPlan) -> int:
    """Parameters on the rank that holds most."""
    ranks = range(plan.tp_size * plan.pp_size)
    return max(num_owned_elements(spec, plan, *divmod(rank, plan.tp_size)) for rank in ranks)
