"""What a served fleet costs before it does anything: the way to its first token, its idle processors, its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import processes
from benchmarks.live_fleet import serving
from benchmarks.machine import BUSY_CORES, OthersMeter
from benchmarks.ray_head import running_ray
from shardray.runtime.client import AsyncClient
from shardray.v1 import control_pb2

Record = dict[str, Any]
SHAPES = (
    (2, 1, 1),
    (1, 1, 2),
)  # tensor, pipeline, replicas: two hosts with a slice each, and two with the same weights
_SETTLE_S = 5.0
_NUM_FILLING, _FILLING_PROMPT, _FILLING_OUTPUT = 48, 160, 32  # more tokens than the pages of a host hold
_KV_BYTES = 64 << 20
_MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class FleetSetup:
    """What is measured."""

    model: str
    dtype: str
    num_threads: int  # of each host
    num_rounds: int  # of starts
    idle_s: float  # for which an idle fleet is watched


async def measure_starts(setup: FleetSetup) -> AsyncIterator[Record]:
    """From the start of ``shardray serve`` to its first token at a client: Ray started with it, and Ray running."""
    for number in range(setup.num_rounds):
        yield await _start(setup, number, "local", {})
        with running_ray() as address:
            yield await _start(setup, number, "running", {"RAY_ADDRESS": address})


async def _start(setup: FleetSetup, number: int, ray: str, environment: dict[str, str]) -> Record:
    settings = _settings(setup, (1, 1, 1)) | {"ray.address": "auto" if environment else "local"}
    meter, began_s = OthersMeter(), time.perf_counter()
    async with serving(settings, environment) as (address, _), AsyncClient(address) as client:
        serving_s = time.perf_counter() - began_s
        await _generate(client, 8, 1)
        first_token_s = time.perf_counter() - began_s
        busy = meter.cores() > BUSY_CORES
    times = {"serving_s": serving_s, "first_token_s": first_token_s, "busy": busy}
    return {"kind": "serve", "contestant": ray, "round": number, **times}


async def measure_rest(setup: FleetSetup) -> Record:
    """Processors that a fleet without requests uses, and its memory over weights and KV, by shape."""
    shapes = [await _measure_shape(setup, shape) for shape in SHAPES]
    return {
        "kind": "fleet",
        "idle_cores": max(shape["idle_cores"] for shape in shapes),
        "most_over_bytes": max(shape["over_bytes"] for shape in shapes),
        "busy": any(shape["busy"] for shape in shapes),
        "shapes": shapes,
    }


async def _measure_shape(setup: FleetSetup, shape: tuple[int, int, int]) -> Record:
    async with serving(_settings(setup, shape)) as (address, _), AsyncClient(address) as client:
        filling = (_generate(client, _FILLING_PROMPT, _FILLING_OUTPUT) for _ in range(_NUM_FILLING))
        await asyncio.gather(*filling)
        await asyncio.sleep(_SETTLE_S)
        meter, before_s = OthersMeter(), _cpu_by_name()
        await asyncio.sleep(setup.idle_s)
        used = {name: (cpu_s - before_s.get(name, 0.0)) / setup.idle_s for name, cpu_s in _cpu_by_name().items()}
        busy = meter.cores() > BUSY_CORES  # while what we started is there, or it would count as others'
        memory = _memory([list(replica.shards) for replica in (await client.fleet()).replicas])
    return {
        "shape": "x".join(map(str, shape)),
        "idle_cores": sum(used.values()),
        "idle_cores_by_process": {name: cores for name, cores in used.items() if cores > 0},
        "busy": busy,
        **memory,
    }


def _memory(replicas: list[list[control_pb2.Shard]]) -> Record:
    """Of the hosts. Weights of replicas on one machine count once: they could be shared."""
    hosts = [shard for shards in replicas for shard in shards]
    pss_bytes = processes.pss_bytes([shard.pid for shard in hosts])
    weight_bytes, kv_bytes = sum(shard.weight_bytes for shard in replicas[0]), sum(shard.kv_bytes for shard in hosts)
    return {
        "num_hosts": len(hosts),
        "pss_bytes": pss_bytes,
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "over_bytes": (pss_bytes - weight_bytes - kv_bytes) / len(hosts),
    }


def _cpu_by_name() -> dict[str, float]:
    """CPU seconds of the server, its hosts and its Ray: of everything that this process has started."""
    found: dict[str, float] = {}
    for pid in _descendants():
        with contextlib.suppress(OSError):
            name = processes.name_of(pid)
            found[name] = found.get(name, 0.0) + processes.cpu_seconds([pid])
    return found


def _descendants() -> Iterator[int]:
    return (pid for pid in processes.process_tree(os.getpid()) if pid != os.getpid())


async def _generate(client: AsyncClient, prompt_len: int, num_tokens: int) -> None:
    prompt = [5 + position % 64 for position in range(prompt_len)]
    async for _ in client.stream(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True):
        pass


def _settings(setup: FleetSetup, shape: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "model.source": setup.model,
        "model.dtype": setup.dtype,
        "model.max_model_len": _MAX_MODEL_LEN,
        "parallel.tensor_parallel_size": shape[0],
        "parallel.pipeline_parallel_size": shape[1],
        "parallel.replicas": shape[2],
        "engine.threads_per_host": setup.num_threads,
        "engine.kv_memory_bytes": _KV_BYTES,
        "engine.share_weights": "true",  # whatever the system has for shared memory
    }


def to_table(records: list[Record]) -> str:
    """Markdown: idle processors and memory by shape."""
    lines = [
        "| tensor × pipeline × replicas | hosts | idle, % of a core | weights, MiB | KV | resident | over, a host |",
        "| --- |" + " ---: |" * 6,
    ]
    for shape in (shape for record in records for shape in record.get("shapes", ())):
        sizes = [shape[name] / 2**20 for name in ("weight_bytes", "kv_bytes", "pss_bytes", "over_bytes")]
        cells = [f"{100 * shape['idle_cores']:.2f}", *(f"{size:.0f}" for size in sizes)]
        lines.append(f"| {shape['shape'].replace('x', ' × ')} | {shape['num_hosts']} | {' | '.join(cells)} |")
    return "\n".join(lines)
