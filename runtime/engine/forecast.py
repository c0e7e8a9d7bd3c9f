"""How long steps of a mesh take: for each rank arithmetic or reading, whichever is slower, messages, and launches.

The roofline of Williams, Waterman and Patterson (2009), once for the products of the layers, for the head and for
attention. How fast hosts are (``hardware.py``) is a data sheet's word, which no kernel keeps, or has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardray.parallel.plan import ShardPlan
from shardray.runtime.engine.hardware import Hardware
from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.model.alike import first_alike_ranks, first_alike_stages
from shardray.runtime.model.costs import StepCost, StepLoad, Traffic, step_cost


@dataclass(frozen=True)
class Rates:
    """What a mesh does at best."""

    stream_tokens_per_s: float  # one sequence alone; 0 for a model that generates nothing
    decode_tokens_per_s: float  # all sequences of the batch
    prefill_tokens_per_s: float  # prompts one after the other, every stage busy
    first_token_s: float  # of one prompt alone


@dataclass(frozen=True)
class TokenCost:
    """A token of a decode batch, or of a prompt: over all ranks, but what is sent by the rank that sends most."""

    flops: float
    num_bytes: float  # weights, keys and values that are read; activations
    sent_bytes: float
    num_messages: float


def traffic_time_s(traffic: Traffic, hardware: Hardware) -> float:
    return traffic.num_messages * hardware.message_s + traffic.num_bytes / hardware.link_bytes_per_s


def rank_time_s(cost: StepCost, load: StepLoad, hardware: Hardware) -> float:
    """Of one rank's part of a step, until its stage is done."""
    speed, is_decode = hardware.speed, load.num_new == 1
    launches = hardware.decode_launches if is_decode else hardware.prefill_launches
    own = speed.products.time_s(cost.products) + speed.products.time_s(cost.head)
    own += speed.attention_time_s(cost.attention, is_decode) + cost.activation_bytes / speed.memory_bytes_per_s
    return own + traffic_time_s(cost.tensor, hardware) + launches.time_s(cost.num_layers, load.num_seqs)


def stage_times_s(served: ServedSpec, plan: ShardPlan, load: StepLoad, hardware: Hardware) -> list[tuple[float, float]]:
    """(computing, handing over) of each stage, as slow as its slowest rank."""
    stages, ranks = first_alike_stages(served.spec, plan), {*first_alike_ranks(served.spec, plan)}
    of_first = {}
    for stage in {*stages}:
        costs = [_cost(served, plan, stage, tp_rank, load) for tp_rank in ranks]
        handing_s = max(traffic_time_s(cost.pipeline, hardware) for cost in costs)
        of_first[stage] = max(rank_time_s(cost, load, hardware) for cost in costs), handing_s
    return [of_first[stage] for stage in stages]


def decode_tokens_per_s(
    served: ServedSpec, plan: ShardPlan, num_seqs: int, context_len: int, hardware: Hardware
) -> float:
    """Sequences are divided over as many steps in flight as there are stages; a round gives each its token."""
    if not served.spec.layers or num_seqs < 1:
        return 0.0
    num_lanes = min(plan.pp_size, num_seqs)
    load = StepLoad(-(-num_seqs // num_lanes), 1, context_len, min(context_len, served.max_prompt_len))
    times = stage_times_s(served, plan, load, hardware.beside(num_lanes * plan.tp_size))
    return num_seqs / decode_round_s(times, num_lanes)


def decode_round_s(times: list[tuple[float, float]], num_lanes: int) -> float:
    """Until each sequence has its token: (computing, handing over) of each stage, and so many steps in flight."""
    return max(sum(map(sum, times)), num_lanes * max(computing_s for computing_s, _ in times))


def prefill_rates(served: ServedSpec, plan: ShardPlan, prompt_len: int, hardware: Hardware) -> tuple[float, float]:
    """(tokens a second with every stage busy, seconds to the first token of a prompt alone)."""
    loads = prompt_steps(served, prompt_len, plan.pp_size)
    together = hardware.beside(plan.pp_size * plan.tp_size)
    alone = hardware.beside(min(plan.pp_size, len(loads)) * plan.tp_size)
    of_stages = [0.0] * plan.pp_size
    for load in loads:
        for stage, (computing_s, _) in enumerate(stage_times_s(served, plan, load, together)):
            of_stages[stage] += computing_s
    return prompt_len / max(of_stages), through_stages_s([stage_times_s(served, plan, load, alone) for load in loads])


def through_stages_s(steps: list[list[tuple[float, float]]]) -> float:
    """Until the last of some steps has left the last stage, each begun as soon as the stage and its input are there."""
    free_s = [0.0] * len(steps[0])
    for step in steps:
        arrived_s = 0.0
        for stage, (computing_s, handing_s) in enumerate(step):
            free_s[stage] = max(free_s[stage], arrived_s) + computing_s
            arrived_s = free_s[stage] + handing_s
    return arrived_s


def prompt_steps(served: ServedSpec, prompt_len: int, num_stages: int) -> list[StepLoad]:
    """The steps in which a prompt is read: chunks of a stage's share of a full step, or whole by an encoder."""
    if served.encoder is not None:
        return [StepLoad(1, prompt_len, 0, is_encoding=True)]
    most = -(-served.max_num_batched_tokens // num_stages)
    return [StepLoad(1, min(most, prompt_len - done), done) for done in range(0, prompt_len, most)]


def mesh_rates(
    served: ServedSpec, plan: ShardPlan, num_seqs: int, context_len: int, prompt_len: int, hardware: Hardware
) -> Rates:
    """``num_seqs`` sequences of ``context_len`` decode; prompts are of ``prompt_len``."""
    prefill, first_token_s = prefill_rates(served, plan, prompt_len, hardware)
    return Rates(
        stream_tokens_per_s=decode_tokens_per_s(served, plan, 1, context_len, hardware),
        decode_tokens_per_s=decode_tokens_per_s(served, plan, num_seqs, context_len, hardware),
        prefill_tokens_per_s=prefill,
        first_token_s=first_token_s,
    )


def decode_cost(served: ServedSpec, plan: ShardPlan, num_seqs: int, context_len: int) -> TokenCost:
    """Of one token, where ``num_seqs`` sequences decode together."""
    load = StepLoad(num_seqs, 1, context_len, min(context_len, served.max_prompt_len))
    return _token_cost(served, plan, [load] if served.spec.layers else [])


def prompt_cost(served: ServedSpec, plan: ShardPlan, prompt_len: int) -> TokenCost:
    """Of one token of a prompt."""
    return _token_cost(served, plan, prompt_steps(served, prompt_len, plan.pp_size))


def _token_cost(served: ServedSpec, plan: ShardPlan, loads: list[StepLoad]) -> TokenCost:
    num_tokens = sum(load.num_tokens for load in loads) or 1
    flops = num_bytes = 0.0
    busiest = Traffic()
    for stage in range(plan.pp_size):
        for tp_rank in range(plan.tp_size):
            costs = [_cost(served, plan, stage, tp_rank, load) for load in loads]
            flops += sum(cost.work.flops for cost in costs)
            num_bytes += sum(cost.work.num_bytes for cost in costs)
            sent = sum((cost.tensor + cost.pipeline for cost in costs), Traffic())
            busiest = max(busiest, sent, key=lambda traffic: (traffic.num_bytes, traffic.num_messages))
    return TokenCost(
        flops / num_tokens, num_bytes / num_tokens, busiest.num_bytes / num_tokens, busiest.num_messages / num_tokens
    )


def _cost(served: ServedSpec, plan: ShardPlan, stage: int, tp_rank: int, load: StepLoad) -> StepCost:
    return step_cost(served.spec, plan, stage, tp_rank, load, served.item_bytes)
