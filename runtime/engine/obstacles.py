"""Why a mesh does not fit onto its hosts, in numbers, and which changes would make it fit."""

from __future__ import annotations

import dataclasses

from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.engine.sizing import HostMemory, PlannedHost, PlannedMesh, fewest_hosts, plan_mesh

_GIB = 1 << 30
_MOST_HOSTS = 64  # that are tried
_FEWEST_STEP_TOKENS = 256  # below that, prompts are read at a crawl


def shortage(mesh: PlannedMesh, offer: HostMemory) -> str:
    """What the tightest host lacks. Of a mesh that does not fit."""
    host = mesh.tightest
    memory = host.memory
    parts = {
        "weights": memory.weight_bytes,
        "an encoder's prompts": memory.encoder_bytes,
        "a step": memory.step_bytes,
        "the process": host.runtime_bytes,
        f"one sequence of {memory.max_model_len:,} tokens": memory.sequence_bytes,
    }
    needs = ", ".join(f"{what} {_gib(num_bytes)}" for what, num_bytes in parts.items() if num_bytes)
    has = f"it has {_gib(_own_bytes(mesh, offer))}, {offer.memory_utilization:.0%} of which may be used"
    if offer.kv_memory_bytes is not None:
        has += f", {_gib(offer.kv_memory_bytes)} for keys and values"
    return (
        f"stage {host.stage} tensor rank {host.tp_rank} lacks {_gib(host.missing_bytes)}: {needs}, "
        f"{_gib(sum(parts.values()))} in all; {has}"
    )


def remedies(served: ServedSpec, mesh: PlannedMesh, offer: HostMemory) -> list[str]:
    """Single changes each of which makes a model fit that does not, as far as there are any."""
    plan, found = mesh.plan, []

    def fits(changed: ServedSpec, changed_offer: HostMemory = offer) -> bool:
        return plan_mesh(changed, plan, changed_offer, mesh.replicas).fits

    most = max(host.memory.sequence_bytes for host in mesh.hosts)
    if offer.kv_memory_bytes is not None and offer.kv_memory_bytes < most:
        if fits(served, dataclasses.replace(offer, kv_memory_bytes=most)):
            found.append(f"raise engine.kv_memory_bytes to {_mib_up(most)}MiB")
    elif offer.memory_utilization < 0.95 and fits(served, dataclasses.replace(offer, memory_utilization=0.95)):
        found.append("raise engine.memory_utilization to 0.95")
    if (longest := _longest_len(mesh)) > 0:
        found.append(f"lower model.max_model_len to {longest}")
    if served.dtype_name == "float32" and fits(dataclasses.replace(served, dtype_name="bfloat16")):
        found.append("set model.dtype to bfloat16, which halves weights, keys and values")
    smaller_steps = max(_FEWEST_STEP_TOKENS, 2 * served.max_num_seqs)
    if fits(dataclasses.replace(served, max_num_batched_tokens=smaller_steps)):
        found.append(f"lower engine.max_num_batched_tokens to {smaller_steps}")
    if offer.is_shared and mesh.replicas > 1 and plan_mesh(served, plan, offer).fits:
        found.append("lower parallel.replicas")
    size = plan.tp_size * plan.pp_size
    enough = fewest_hosts(served, offer, plan.expert_parallel, _MOST_HOSTS, size + 1)
    if enough is not None:
        found.append(
            f"use {enough.plan.tp_size * enough.plan.pp_size} hosts: parallel.tensor_parallel_size "
            f"{enough.plan.tp_size}, parallel.pipeline_parallel_size {enough.plan.pp_size}"
        )
    if not found:
        found.append(f"no single setting and no {_MOST_HOSTS} such hosts are enough; use hosts with more memory")
    return found


def _longest_len(mesh: PlannedMesh) -> int:
    """The longest context window for which every host has room, in whole pages; 0 if none has room for a page."""

    def longest(host: PlannedHost) -> int:
        memory = host.memory
        if memory.page_bytes == 0:
            return memory.max_model_len if host.room_bytes >= 0 else 0
        pages = host.room_bytes // memory.page_bytes + (-memory.max_prompt_len // memory.block_size)
        return max(0, min(pages * memory.block_size, memory.max_model_len))

    found = min(map(longest, mesh.hosts))
    return found if found < mesh.hosts[0].memory.max_model_len else 0


def _own_bytes(mesh: PlannedMesh, offer: HostMemory) -> int:
    """What one host has, or its part of what all share."""
    return offer.num_bytes // (len(mesh.hosts) * mesh.replicas) if offer.is_shared else offer.num_bytes


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"


def _mib_up(num_bytes: int) -> int:
    return -(-num_bytes // (1 << 20))
