"""A real fleet as it is seen from outside, under load and through a recovery: every metric is there, and moves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shardray.runtime.client import AsyncClient, ServerError
from shardray.runtime.observe.catalog import METRICS
from tests.command import Command
from tests.model.zoo import save
from tests.observe.expressions import EXPRESSIONS, metrics_of

pytestmark = pytest.mark.integration
SETTINGS = (
    "model.max_model_len=128", "model.dtype=float32", "engine.kv_memory_bytes=100KiB", "engine.max_num_seqs=8",
    "engine.step_timeout_s=2", "engine.block_size=4", "engine.max_num_batched_tokens=64", "engine.max_draft_tokens=7",
    "cluster.spares=1", "parallel.tensor_parallel_size=2", "limits.max_queued_requests=4",
    "grpc.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0", "logging.format=json", "logging.level=info",
)  # fmt: skip
# What says how things are, and need not move while they are so.
STILL = {
    "shardray:build_info", "shardray:start_time_seconds", "vllm:cache_config_info", "shardray:spares_wanted",
    "shardray:kv_tokens", "shardray:shard_weight_bytes", "shardray:shard_kv_bytes",
}  # fmt: skip
OF_PROMETHEUS = {"up"}
PROMPT = [5, 17, 42, 93, 3, 64, 21]
Scrape = dict[tuple[str, str], float]  # value by name and labels


@dataclass
class Run:
    """What was seen of a fleet."""

    scrapes: list[Scrape]
    values: dict[str, dict[str, set[float]]]  # that each series had, by name and labels; 0 if it was not there at first
    log: list[dict[str, Any]]


def values_in(scrapes: list[Scrape]) -> dict[str, dict[str, set[float]]]:
    seen: dict[str, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for scrape in scrapes:
        for (name, labels), value in scrape.items():
            seen[name][labels].add(value)
            if (name, labels) not in scrapes[0]:
                seen[name][labels].add(0.0)
    return seen


def scrape(address: str) -> Scrape:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(s.name, json.dumps(s.labels)): s.value for family in families for s in family.samples}


def unmoved(scrapes: list[Scrape]) -> list[str]:
    """The metrics of the catalog that are not there, or had one value all along though they are not ``STILL``."""
    values, still = values_in(scrapes), []
    for metric in METRICS:
        name = f"{metric.name}_count" if metric.kind == "histogram" else metric.exported_name
        moved = any(len(seen) > 1 for seen in values[name].values())
        if not (moved or (metric.name in STILL and any(max(seen) > 0 for seen in values[name].values()))):
            still.append(name)
    return still


def until_all_have_moved(metrics: str, scrapes: list[Scrape], timeout_s: float = 30.0) -> None:
    """Hosts are asked for their figures twice a second."""
    deadline = time.monotonic() + timeout_s
    while unmoved(scrapes) and time.monotonic() < deadline:
        time.sleep(0.2)
        scrapes.append(scrape(metrics))


def until_a_spare_is_ready(metrics: str, scrapes: list[Scrape], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(name == "shardray:spares_ready" and value for (name, _), value in scrapes[-1].items()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        scrapes.append(scrape(metrics))


async def ask(client: AsyncClient, index: int, temperature: float = 1.0) -> None:
    with contextlib.suppress(ServerError):  # some are refused: that is to be seen too
        await client.generate(
            [*PROMPT, index], max_tokens=80, temperature=temperature, ignore_eos=True, request_id=f"load-{index}"
        )


async def ask_once(address: str) -> None:
    async with AsyncClient(address, timeout_s=60) as client:
        await ask(client, 12, temperature=0.0)  # a text that goes round, of which tokens are drafted


async def burden(address: str, metrics: str, victim: int, scrapes: list[Scrape]) -> None:
    """More requests than there is room for, a host that dies under them, a bad request; scraped all along."""
    async with AsyncClient(address, timeout_s=60) as client:
        async with asyncio.TaskGroup() as asking:
            tasks = [asking.create_task(ask(client, index)) for index in range(12)]
            with contextlib.suppress(ServerError):
                await client.generate(PROMPT, temperature=-1.0)
            while not any(name == "vllm:generation_tokens_total" and value for (name, _), value in scrapes[-1].items()):
                scrapes.append(await asyncio.to_thread(scrape, metrics))
            assert not all(task.done() for task in tasks)
            os.kill(victim, signal.SIGKILL)
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.1)
                scrapes.append(await asyncio.to_thread(scrape, metrics))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = save("mixtral", tmp_path_factory.mktemp("mixtral"))
    options = [option for setting in (f"model.source={folder}", *SETTINGS) for option in ("--set", setting)]
    command = Command(("serve", "--json", *options))
    metrics = command.until_event("metrics")["address"]
    scrapes = [scrape(metrics)]  # the fleet is loading still
    serving = command.until_event("serving")
    until_a_spare_is_ready(metrics, scrapes)
    asyncio.run(burden(serving["address"], metrics, serving["shards"][1]["pid"], scrapes))
    command.until_event("recovered")
    asyncio.run(ask_once(serving["address"]))  # of the mesh that stands now
    refused = [sys.executable, "-m", "shardray", "scale", "--replicas", "64", "--server", serving["address"]]
    assert subprocess.run(refused, capture_output=True, timeout=60, check=False).returncode == 1
    scrapes.append(scrape(metrics))
    until_all_have_moved(metrics, scrapes)
    command.process.terminate()
    _, stderr = command.process.communicate(timeout=60)
    assert command.process.returncode == 0
    log = [json.loads(line) for line in stderr.splitlines()]
    yield Run(scrapes, values_in(scrapes), log)
    assert command.left_behind() == []


def test_every_metric_of_the_catalog_is_there_and_moves(run: Run) -> None:
    assert unmoved(run.scrapes) == []


def test_every_metric_that_the_board_and_the_alerts_name_is_there(run: Run) -> None:
    named = set().union(*map(metrics_of, EXPRESSIONS)) - OF_PROMETHEUS
    assert named - set(run.values) == set()


def test_every_shard_tells_its_steps_and_its_memory(run: Run) -> None:
    told = [json.loads(labels) for name, labels in run.scrapes[-1] if name == "shardray:shard_steps_total"]
    assert {(shard["stage"], shard["tensor"]) for shard in told} == {("0", "0"), ("0", "1")}
    memory = [value for (name, _), value in run.scrapes[-1].items() if name == "shardray:shard_memory_bytes"]
    assert all(value > 50 << 20 for value in memory)  # a process with torch in it


def test_the_log_is_json_and_has_a_line_for_each_request(run: Run) -> None:
    ended = [line for line in run.log if "finish_reason" in line]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in run.log)
    assert all(line["request_id"].startswith("load-") for line in ended)
    lengths = [line for line in ended if line["finish_reason"] == "length"]
    assert lengths
    assert all(line["num_output_tokens"] == 80 and line["total_s"] > 0 for line in lengths)
    assert any("lost its mesh" in line["message"] and line["level"] == "error" for line in run.log)
