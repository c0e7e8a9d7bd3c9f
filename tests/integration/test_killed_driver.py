"""A driver is killed under streams and started again with its journal, over hosts that it takes over or new ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from shardray.runtime.client import AsyncClient, Completion
from shardray.runtime.client.results import join
from tests.cluster.fleets import PROMPT_IDS
from tests.integration.test_takeover import cluster, driver, tiny_llama  # noqa: F401 - fixtures

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]
CASES: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 3},
    *({"temperature": 1.0, "top_k": 40, "seed": seed, "logprobs": 0} for seed in range(7)),
]


async def generate_all(client: AsyncClient, started: asyncio.Event) -> list[Completion]:
    """``started`` is set once every stream has its first tokens."""
    num_started = 0

    async def generate(index: int, case: dict[str, Any]) -> list[Any]:
        nonlocal num_started
        deltas = []
        prompt = [*PROMPT_IDS, index]
        async for delta in client.stream(prompt, max_tokens=100, ignore_eos=True, timeout_s=120, **case):
            deltas.append(delta)
            num_started += len(deltas) == 1
            if num_started == len(CASES):
                started.set()
        return deltas

    return [join(deltas) for deltas in await asyncio.gather(*map(generate, range(len(CASES)), CASES))]


@pytest.mark.parametrize("hosts", ["taken over", "new"])
async def test_streams_of_a_killed_driver_go_on_with_the_same_tokens(
    cluster: Cluster,  # noqa: F811
    tiny_llama: Path,  # noqa: F811
    tmp_path: Path,
    hosts: str,
) -> None:
    settings: dict[str, Any] = {"driver.journal": tmp_path / "journal.db"}
    changed = {"engine.max_num_batched_tokens": 96} if hosts == "new" else {}
    with driver(cluster, tiny_llama, f"killed-{hosts}", **settings) as first:
        async with AsyncClient(first.address) as client:
            undisturbed = await generate_all(client, asyncio.Event())
            started = asyncio.Event()
            streams = asyncio.create_task(generate_all(client, started))
            await started.wait()
            first.kill()
            again: dict[str, Any] = settings | changed | {"grpc.listen": first.address}
            with driver(cluster, tiny_llama, f"killed-{hosts}", **again) as second:
                answers = await streams
            assert (second.pids == first.pids) is (hosts == "taken over")
    for answer, expected in zip(answers, undisturbed, strict=True):
        assert answer.token_ids == expected.token_ids
        assert answer.text == expected.text
        chosen = [position.chosen.logprob for position in answer.logprobs]
        assert chosen == pytest.approx([position.chosen.logprob for position in expected.logprobs], abs=1e-4)
