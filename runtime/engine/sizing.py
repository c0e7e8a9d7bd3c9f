"""Whether a mesh fits onto its hosts, what is left for keys and values, and which shape is best: nothing is started.

Forecasts what hosts will report, by the formulas of ``memory.py`` that they use themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from shardray.parallel.plan import PlanError, ShardPlan
from shardray.runtime.engine.forecast import Rates, mesh_rates
from shardray.runtime.engine.hardware import Hardware
from shardray.runtime.engine.memory import MemoryGrant, RankMemory, rank_memory, room_on_cpu, room_on_gpu
from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.engine.shapes import cut, merit, shapes_within
from shardray.runtime.model.alike import first_alike_ranks, first_alike_stages

_MIB = 1 << 20
# Memory of a process before its weights: the interpreter, torch and compiled kernels; on a GPU its context, its kernels
# and the buffers of NCCL. An estimate: it depends on the driver and on what else is loaded.
RUNTIME_BYTES = {"cpu": 400 * _MIB, "cuda": 1024 * _MIB}


@dataclass(frozen=True)
class HostMemory:
    """What a host has to offer. ``is_shared``: the bytes are of a machine that holds all hosts, not of each.

    ``shares_weights``: there replicas hold their weights once.
    """

    device_type: str  # "cpu" or "cuda"
    num_bytes: int
    is_shared: bool
    is_packed: bool  # see parallel/layers.py
    memory_utilization: float
    kv_memory_bytes: int | None = None
    shares_weights: bool = False


@dataclass(frozen=True)
class PlannedHost:
    """One rank's place and needs; ``room_bytes`` is what is left for its pages, below zero if that is not enough."""

    rank: int
    stage: int
    tp_rank: int
    layers: range
    num_heads: int
    num_kv_heads: int
    memory: RankMemory
    runtime_bytes: int
    room_bytes: int

    @property
    def missing_bytes(self) -> int:
        """What it lacks for the pages of one sequence; 0 if nothing."""
        if self.memory.page_bytes == 0:
            return max(0, -self.room_bytes)
        return max(0, self.memory.sequence_bytes - self.room_bytes)


@dataclass(frozen=True)
class PlannedMesh:
    """One shape on hosts of one kind."""

    plan: ShardPlan
    replicas: int
    hosts: tuple[PlannedHost, ...]

    @property
    def fits(self) -> bool:
        return self.tightest.missing_bytes == 0

    @property
    def tightest(self) -> PlannedHost:
        """The host that lacks most, or has the least room for one more sequence."""
        return max(self.hosts, key=lambda host: (host.missing_bytes, host.memory.sequence_bytes - host.room_bytes))

    @property
    def num_pages(self) -> int:
        """As many as every rank has room for; 0 if the shape does not fit."""
        return min(host.memory.num_pages(host.room_bytes) for host in self.hosts) if self.fits else 0

    @property
    def num_kv_tokens(self) -> int:
        return self.num_pages * self.hosts[0].memory.block_size

    @property
    def num_full_sequences(self) -> float:
        """Full-length sequences that can run at the same time."""
        return self.num_pages / self.hosts[0].memory.pages_of_one

    def num_sequences(self, num_tokens: int) -> int:
        """Sequences of ``num_tokens`` (and as long a prompt, where an encoder reads it) that run at the same time."""
        memory = self.hosts[0].memory
        of_prompt = min(num_tokens, memory.max_prompt_len)
        pages = -(-num_tokens // memory.block_size) - (-of_prompt // memory.block_size)
        return min(self.num_pages // pages, memory.max_num_seqs)

    def kv_bytes(self, host: PlannedHost) -> int:
        return self.num_pages * host.memory.page_bytes


def plan_mesh(served: ServedSpec, plan: ShardPlan, offer: HostMemory, replicas: int = 1) -> PlannedMesh:
    """``replicas`` meshes of one cut, each on hosts of its own."""
    places = [divmod(rank, plan.tp_size) for rank in range(plan.tp_size * plan.pp_size)]
    stages, ranks = first_alike_stages(served.spec, plan), first_alike_ranks(served.spec, plan)
    of_first = {
        place: rank_memory(served, plan, *place, offer.is_packed) for place in itertools.product({*stages}, {*ranks})
    }
    needs = [of_first[stages[stage], ranks[tp_rank]] for stage, tp_rank in places]
    runtime_bytes = RUNTIME_BYTES[offer.device_type]
    in_use = replicas * sum(need.loaded_bytes + runtime_bytes for need in needs)
    if offer.shares_weights:
        in_use -= (replicas - 1) * sum(need.weight_bytes for need in needs)
    return PlannedMesh(
        plan,
        replicas,
        tuple(
            PlannedHost(
                rank=rank,
                stage=stage,
                tp_rank=tp_rank,
                layers=plan.stages[stage],
                num_heads=len(plan.heads[tp_rank]),
                num_kv_heads=len(plan.kv_heads[tp_rank]),
                memory=needs[rank],
                runtime_bytes=runtime_bytes,
                room_bytes=_room(offer, needs[rank], in_use, replicas, len(places)),
            )
            for rank, (stage, tp_rank) in enumerate(places)
        ),
    )


def _room(offer: HostMemory, memory: RankMemory, in_use: int, replicas: int, num_ranks: int) -> int:
    """For the pages of one rank, once ``in_use`` bytes are taken where hosts share, or its own where they do not."""
    if not offer.is_shared:
        in_use, replicas, num_ranks = memory.loaded_bytes + RUNTIME_BYTES[offer.device_type], 1, 1
    grant = MemoryGrant(offer.memory_utilization / replicas, offer.kv_memory_bytes, num_ranks)
    free = offer.num_bytes - in_use
    if offer.kv_memory_bytes is not None:
        return min(offer.kv_memory_bytes, free // num_ranks // replicas - memory.step_bytes)
    if offer.device_type == "cuda":
        return room_on_gpu(free, offer.num_bytes, memory, grant)
    return room_on_cpu(max(0, free), memory, grant)


@dataclass(frozen=True)
class Load:
    """What a fleet is to be compared under."""

    num_seqs: int  # decoding at the same time, in all replicas
    context_len: int
    prompt_len: int


@dataclass(frozen=True)
class Candidate:
    """One way to use a number of hosts."""

    mesh: PlannedMesh
    num_seqs: int  # that decode in each replica under the load, as far as pages reach
    rates: Rates | None  # of one replica; None if it does not fit, or nothing is known of the hosts' speed

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all replicas."""
        return 0.0 if self.rates is None else self.mesh.replicas * self.rates.decode_tokens_per_s


def try_shape(
    served: ServedSpec, plan: ShardPlan, replicas: int, offer: HostMemory, load: Load, hardware: Hardware | None
) -> Candidate:
    """What one shape does under a load."""
    mesh = plan_mesh(served, plan, offer, replicas)
    num_seqs = min(-(-load.num_seqs // replicas), mesh.num_sequences(load.context_len + 1))
    rates = None
    if mesh.fits and hardware is not None:
        rates = mesh_rates(served, plan, max(1, num_seqs), load.context_len, load.prompt_len, hardware.among(replicas))
    return Candidate(mesh, num_seqs, rates)


def candidates(
    served: ServedSpec,
    num_hosts: int,
    offer: HostMemory,
    load: Load,
    hardware: Hardware | None,
    expert_parallel: bool,
) -> list[Candidate]:
    """Every shape for ``num_hosts``, filled up with replicas, the best first.

    Those that fit come first. Then decides, if the hosts' speed is known, how many tokens a second all replicas decode
    under the load, and if that is alike, one stream's; else, as for a fleet that lost hosts: more hosts in a mesh, then
    the smaller largest share of the weights, then fewer stages.
    """  # fmt: skip
    found = []
    for tp_size, pp_size in shapes_within(num_hosts, served.spec.num_layers):
        plan, replicas = cut(served.spec, tp_size, pp_size, expert_parallel), num_hosts // (tp_size * pp_size)
        found.append(try_shape(served, plan, replicas, offer, load, hardware))

    def key(one: Candidate) -> tuple[float, ...]:
        alike = merit(served.spec, one.mesh.plan)
        if one.rates is None:
            return (not one.mesh.fits, 0.0, 0.0, *alike)
        return (not one.mesh.fits, -one.decode_tokens_per_s, -one.rates.stream_tokens_per_s, *alike)

    return sorted(found, key=key)


def fewest_hosts(
    served: ServedSpec, offer: HostMemory, expert_parallel: bool, most: int, first: int = 1
) -> PlannedMesh | None:
    """The smallest mesh that fits, of ``first`` to ``most`` hosts; of two that are as small the more tensor ranks."""
    for num_hosts in range(first, most + 1):
        for plan in _plans_of(served, num_hosts, expert_parallel):
            mesh = plan_mesh(served, plan, offer)
            if mesh.fits:
                return mesh
    return None


def _plans_of(served: ServedSpec, num_hosts: int, expert_parallel: bool) -> Iterable[ShardPlan]:
    for tp_size in range(min(num_hosts, served.spec.attention.num_heads), 0, -1):
        if num_hosts % tp_size == 0:
            try:
                yield cut(served.spec, tp_size, num_hosts // tp_size, expert_parallel)
            except PlanError:
                continue
