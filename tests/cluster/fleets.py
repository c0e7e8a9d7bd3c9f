"""What the cluster tests share: a tiny checkpoint, fleets of it, and tokens asked of a replica's leader."""

from __future__ import annotations

import asyncio
import functools
import os
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from ray.util.placement_group import remove_placement_group

from shardray.runtime.cluster.events import EventSink, ignore_events
from shardray.runtime.cluster.form import FormedMesh, MeshRecipe, form
from shardray.runtime.cluster.layout import core_shares
from shardray.runtime.cluster.lease import group_prefix
from shardray.runtime.cluster.messages import Rejection
from shardray.runtime.cluster.placement import place
from shardray.runtime.cluster.remote_host import RemoteHost, start_host
from shardray.runtime.cluster.replica_set import ReplicaSet, hosts_need
from shardray.runtime.config import (
    ClusterSettings,
    Config,
    EngineSettings,
    ModelSettings,
    ParallelSettings,
    RaySettings,
)
from shardray.runtime.driver.link import ReplicaLink
from shardray.runtime.engine.request import EngineRequest, SamplingParams, TokenOutput

PROMPT_IDS = (5, 17, 42, 99, 3, 64, 21)
NUM_TOKENS = 24
_STORE_BYTES = 80 << 20
# Ray gives a node up after five failed checks: those of a killed one fail at once, a slow one has ten seconds for each.
_QUICK_CHECKS = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500}


def start_head(**options: Any) -> Cluster:
    """A Ray whose head has ``options``; once more, if another process took a port that Ray had picked for it."""
    options |= {"object_store_memory": _STORE_BYTES, "include_dashboard": False}
    try:
        return Cluster(initialize_head=True, head_node_args=options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        return Cluster(initialize_head=True, head_node_args=options)


@contextmanager
def several_nodes(num_nodes: int, num_cpus: int) -> Iterator[Cluster]:
    """A Ray on this machine: a head without room for hosts, and nodes with room for ``num_cpus`` each."""
    cluster = start_head(num_cpus=0, _system_config=_QUICK_CHECKS)
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=num_cpus, object_store_memory=_STORE_BYTES)
        yield cluster
    finally:
        cluster.shutdown()


def make_tiny_llama(folder: Path) -> Path:
    """A random Llama of 4 layers, 6 query heads and 2 KV heads in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # far from uniform logits, so that greedy tokens say something
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


@functools.cache
def reference_ids(folder: Path, prompt_ids: tuple[int, ...] = PROMPT_IDS, num_tokens: int = NUM_TOKENS) -> list[int]:
    """The greedy continuation by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import one_thread

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([prompt_ids])
    with one_thread():
        output = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False)
    return [int(token_id) for token_id in output[0, len(prompt_ids) :]]


def fleet_config(
    folder: Path, tp_size: int = 1, pp_size: int = 1, replicas: int = 1, address: str = "local", **settings: Any
) -> Config:
    """``settings``: step_timeout_s, form_timeout_s, placement_strategy, spares, max_failed_forms, degrade, tls."""
    ray_settings = {key: settings.pop(key) for key in ("form_timeout_s", "placement_strategy") if key in settings}
    cluster_settings = {
        key: settings.pop(key) for key in ("spares", "max_failed_forms", "degrade", "tls") if key in settings
    }
    return Config(
        model=ModelSettings(source=str(folder), dtype="float32"),
        parallel=ParallelSettings(tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, replicas=replicas),
        engine=EngineSettings(max_num_seqs=8, max_num_batched_tokens=64, kv_memory_bytes=4 << 20, **settings),
        ray=RaySettings(address=address, **ray_settings),
        cluster=ClusterSettings(**cluster_settings),
    )


class RecordingOutlet:
    """Knows which mesh of a replica is up, and what was told of it."""

    def __init__(self) -> None:
        self.meshes: dict[int, FormedMesh] = {}
        self.losses: list[str] = []
        self.refuses = False  # to go over to another mesh
        self._changed = asyncio.Condition()

    async def up(self, replica_id: int, mesh: FormedMesh) -> None:
        if self.refuses:
            raise ConnectionError("refused")
        async with self._changed:
            self.meshes[replica_id] = mesh
            self._changed.notify_all()

    def down(self, replica_id: int, reason: str, failed: bool) -> None:
        self.meshes.pop(replica_id, None)
        self.losses.append(reason)

    async def next_mesh(self, replica_id: int, before: FormedMesh, timeout_s: float = 60.0) -> FormedMesh:
        """The mesh that comes up after ``before``."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self.meshes.get(replica_id, before) is not before)
        return self.meshes[replica_id]


@asynccontextmanager
async def running(
    config: Config, events: EventSink = ignore_events
) -> AsyncIterator[tuple[ReplicaSet, RecordingOutlet]]:
    outlet = RecordingOutlet()
    fleet = await ReplicaSet.start(config, config.model.source, outlet, events)
    try:
        yield fleet, outlet
    finally:
        await fleet.stop()


@asynccontextmanager
async def hosts_of(config: Config) -> AsyncIterator[list[RemoteHost]]:
    """Unassigned hosts, as many as one replica of ``config`` needs."""
    need = hosts_need(config)
    name = f"{group_prefix(config.ray.namespace)}{uuid.uuid4().hex}"
    group = await place(need, name, timeout_s=20, can_grow=False, on_wait=lambda reason, remaining_s: None)
    try:
        yield [await start_host(group, name, index, need, timeout_s=30) for index in range(need.num_hosts)]
    finally:
        remove_placement_group(group)


async def form_from(hosts: Sequence[RemoteHost], config: Config, folder: Path | None = None) -> FormedMesh:
    """A mesh on loopback addresses; ``folder`` in place of the configured model."""
    shares = core_shares([host.info for host in hosts], None)
    recipe = MeshRecipe(config, str(folder or config.model.source))
    return await form(hosts, shares, recipe, ["127.0.0.1"] * len(hosts), lambda rank, host, doing, fraction: None)


async def generate(
    mesh: FormedMesh, num_tokens: int = NUM_TOKENS, timeout_s: float = 30.0, began: asyncio.Event | None = None
) -> list[int]:
    """Greedy tokens from the mesh's leader, over the same link that the driver uses. ``began``: the first has come."""
    arrived: asyncio.Queue[list[TokenOutput]] = asyncio.Queue()

    def on_events(outputs: list[TokenOutput], rejections: list[Rejection]) -> None:
        assert not rejections
        arrived.put_nowait(outputs)

    link = ReplicaLink(on_events)
    await link.connect(mesh.address, mesh.credentials)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    link.submit(EngineRequest(request_id="r", prompt_ids=PROMPT_IDS, params=params))
    token_ids: list[int] = []
    try:
        async with asyncio.timeout(timeout_s):
            while len(token_ids) < num_tokens:
                token_ids += [out.token_id for out in await arrived.get() if out.token_id is not None]
                if began is not None and token_ids:
                    began.set()
    finally:
        await link.close()
    return token_ids


async def until_gone(pids: Sequence[int], timeout_s: float = 10.0) -> list[int]:
    """Those of ``pids`` that are still there after ``timeout_s``."""
    for _ in range(int(timeout_s / 0.05)):
        alive = [pid for pid in pids if _is_alive(pid)]
        if not alive:
            return []
        await asyncio.sleep(0.05)
    return alive


def descendants() -> set[int]:
    """Every process that this one started, or that its children did."""
    return {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
