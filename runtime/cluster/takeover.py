"""What a driver finds when it starts: the hosts, and the meshes that still run, of one that is gone."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe, dissolve
from shardray.runtime.cluster.lease import RENEWAL_S, SILENCE_S
from shardray.runtime.cluster.remote_host import RemoteHost, find_hosts
from shardray.runtime.cluster.reports import HostState
from shardray.runtime.config.units import join_listen
from shardray.runtime.engine.assignment import ShardAssignment

_log = logging.getLogger(__name__)
_ANSWER_S = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class FoundFleet:
    """What can be used on; everything else was ended."""

    meshes: tuple[tuple[FormedMesh, MeshRecipe], ...]  # they run, in the shape of their recipe
    idle: tuple[RemoteHost, ...]


async def take_over(owner: str, recipe: MeshRecipe, on_gpus: bool) -> FoundFleet:
    """Make the hosts of this Ray namespace ``owner``'s; keep the meshes that serve what ``recipe`` does.

    Their shape may be another one, if the fleet was scaled. Hosts with a GPU are of no use without ``on_gpus``, nor
    those without one with it. Raises ClusterError if another driver is alive.
    """
    hosts = await _claim(await find_hosts(_ANSWER_S), owner, recipe.config.cluster.lease_s)
    states = await _answers(hosts, lambda host: host.state())
    meshes = [mesh for ranks in _by_epoch(states) if (mesh := _mesh_of(ranks, recipe)) is not None]
    kept = {host for mesh, _ in meshes for host in mesh.hosts}
    idle = await dissolve([host for host in states if host not in kept])
    unfit = [host for host in idle if (host.info.device != "cpu") != on_gpus]
    await asyncio.gather(*(host.kill() for host in unfit))
    return FoundFleet(tuple(meshes), tuple(host for host in idle if host not in unfit))


async def _claim(hosts: Iterable[RemoteHost], owner: str, lease_s: float) -> Iterable[RemoteHost]:
    """Wait until the last driver has been silent for long enough to be sure that it is gone. Returns who is left."""
    for _ in range(int(2 * SILENCE_S / RENEWAL_S)):
        is_ours = await _answers(hosts, lambda host: host.renew(owner, lease_s))
        if all(is_ours.values()):
            return is_ours
        hosts = is_ours
        await asyncio.sleep(RENEWAL_S)
    raise ClusterError("another driver serves from this Ray namespace; give each fleet its own (ray.namespace)")


async def _answers(hosts: Iterable[RemoteHost], ask: Callable[[RemoteHost], Awaitable[_T]]) -> dict[RemoteHost, _T]:
    """What each host answers. One that does not is ended: the fleet can do without it."""

    async def answer(host: RemoteHost) -> tuple[RemoteHost, _T] | None:
        try:
            return host, await ask(host)
        except ClusterError as error:
            _log.warning("a host is not taken over: %s", error)
            await host.kill()
            return None

    return dict(filter(None, await asyncio.gather(*map(answer, hosts))))


_Rank = tuple[RemoteHost, HostState]


def _by_epoch(states: Mapping[RemoteHost, HostState]) -> list[list[_Rank]]:
    meshes: dict[str, list[_Rank]] = defaultdict(list)
    for host, state in states.items():
        if state.assignment is not None and state.runs:
            meshes[state.assignment.epoch].append((host, state))
    return list(meshes.values())


def _mesh_of(ranks: list[_Rank], recipe: MeshRecipe) -> tuple[FormedMesh, MeshRecipe] | None:
    """The mesh that these ranks are, if it is whole and serves what ``recipe`` asks for."""
    ranked = sorted(ranks, key=lambda rank: _place_of(rank).rank)
    leader = _place_of(ranked[0])
    is_whole = len(ranked) == leader.tp_size * leader.pp_size and leader.rank == 0
    if not is_whole:
        return None
    if ranked[0][1].purpose != recipe.purpose:
        _log.warning("a mesh of %d hosts runs with other settings; it is formed anew", len(ranked))
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
