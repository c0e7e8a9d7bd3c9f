"""What a driver finds when it starts: the hosts, and the meshes that still run, of one that is gone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe, dissolve, tls_files
from shardray.runtime.cluster.lease import RENEWAL_S, SILENCE_S
from shardray.runtime.cluster.remote_host import RemoteHost, find_hosts
from shardray.runtime.cluster.reports import HostState
from shardray.runtime.config.units import join_listen
from shardray.runtime.engine.assignment import ShardAssignment

_ANSWER_S = 10.0


@dataclass(frozen=True)
class FoundFleet:
    """What can be used on; everything else was ended."""

    meshes: tuple[tuple[FormedMesh, MeshRecipe], ...]  # they run, in the shape of their recipe
    idle: tuple[RemoteHost, ...]


async def take_over(owner: str, recipe: MeshRecipe) -> FoundFleet:
    """Make the hosts of this Ray namespace ``owner``'s; keep the meshes that serve what ``recipe`` does.

    Their shape may be another one, if the fleet was scaled. Raises ClusterError if another driver is alive.
    """
    hosts = await find_hosts(_ANSWER_S)
    await _claim(hosts, owner, recipe.config.cluster.lease_s)
    states = await asyncio.gather(*(host.state() for host in hosts))
    meshes = [mesh for ranks in _by_epoch(hosts, states) if (mesh := _mesh_of(ranks, recipe)) is not None]
    kept = {host for mesh, _ in meshes for host in mesh.hosts}
    return FoundFleet(tuple(meshes), tuple(await dissolve([host for host in hosts if host not in kept])))


async def _claim(hosts: Sequence[RemoteHost], owner: str, lease_s: float) -> None:
    """Wait until the last driver has been silent for long enough to be sure that it is gone."""
    for _ in range(int(2 * SILENCE_S / RENEWAL_S)):
        if all(await asyncio.gather(*(host.renew(owner, lease_s) for host in hosts))):
            return
        await asyncio.sleep(RENEWAL_S)
    raise ClusterError("another driver serves from this Ray namespace; give each fleet its own (ray.namespace)")


_Rank = tuple[RemoteHost, HostState]


def _by_epoch(hosts: Sequence[RemoteHost], states: Sequence[HostState]) -> list[list[_Rank]]:
    meshes: dict[str, list[_Rank]] = defaultdict(list)
    for host, state in zip(hosts, states, strict=True):
        if state.assignment is not None and state.runs:
            meshes[state.assignment.epoch].append((host, state))
    return list(meshes.values())


def _mesh_of(ranks: list[_Rank], recipe: MeshRecipe) -> tuple[FormedMesh, MeshRecipe] | None:
    """The mesh that these ranks are, if it is whole and serves what ``recipe`` asks for."""
    ranked = sorted(ranks, key=lambda rank: _place_of(rank).rank)
    leader = _place_of(ranked[0])
    is_whole = len(ranked) == leader.tp_size * leader.pp_size and leader.rank == 0
    if not is_whole or not _serves(leader, recipe):
        return None
    mesh = FormedMesh(
        credentials=leader.credentials,
        address=join_listen(leader.bind_host, ranked[0][1].port or 0),
        tp_size=leader.tp_size,
        hosts=tuple(host for host, _ in ranked),
        shards=tuple(state.shard for _, state in ranked if state.shard is not None),
    )
    parallel = dataclasses.replace(
        recipe.config.parallel,
        tensor_parallel_size=leader.tp_size,
        pipeline_parallel_size=leader.pp_size,
        tensor_split=leader.tensor_split,
        stage_layers=leader.stage_layers,
        expert_parallel=leader.expert_parallel,
    )
    return mesh, MeshRecipe(dataclasses.replace(recipe.config, parallel=parallel), recipe.model_dir)


def _place_of(rank: _Rank) -> ShardAssignment:
    place = rank[1].assignment
    assert place is not None
    return place


def _serves(place: ShardAssignment, recipe: MeshRecipe) -> bool:
    model, engine = recipe.config.model, recipe.config.engine
    wanted = (
        (place.model_dir, recipe.model_dir),
        (place.dtype, model.dtype),
        (place.max_model_len, model.max_model_len),
        (place.max_num_seqs, engine.max_num_seqs),
        (place.max_num_batched_tokens, engine.max_num_batched_tokens),
        (place.max_prefill_beside_decodes, engine.max_prefill_beside_decodes),
        (place.prefix_caching, engine.prefix_caching),
        (place.block_size, engine.block_size),
        (place.kv_memory_bytes, engine.kv_memory_bytes),
        (place.step_timeout_s, engine.step_timeout_s),
        (place.tls, tls_files(recipe.config)),
    )
    return all(has == wants for has, wants in wanted)
