"""A request that by itself breaks every step that runs it fails alone; the streams beside it go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardray.runtime.client import AsyncClient, ServerError
from tests.chaos.poison.sitecustomize import KILLING_ID, RAISING_ID
from tests.chaos.served import Served
from tests.chaos.tiny import save_tiny

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(600)]

_PROMPTS = [(5, 17, 42, number) for number in range(5)]
_MAX_TOKENS = 300


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "poison"), prepend=":")
    settings = [
        f"model.source={save_tiny(tmp_path)}",
        "model.dtype=float32",
        "model.max_model_len=512",
        "parallel.tensor_parallel_size=2",
        "engine.kv_memory_bytes=16MiB",
        "cluster.spares=1",
        "grpc.listen=127.0.0.1:0",
    ]
    served = Served(settings)
    try:
        yield served
    finally:
        assert served.stop() == []


async def _answer(client: AsyncClient, prompt: tuple[int, ...]) -> list[int]:
    # No byte that poisons: what a lost mesh had generated is prefilled by the next one.
    bias = {RAISING_ID: -100.0, KILLING_ID: -100.0}
    answer = await client.generate(prompt, temperature=0.0, max_tokens=_MAX_TOKENS, ignore_eos=True, logit_bias=bias)
    return answer.token_ids


@pytest.mark.parametrize("poison_id", [RAISING_ID, KILLING_ID], ids=["raises", "kills"])
def test_a_request_that_breaks_its_step_fails_alone(served: Served, poison_id: int) -> None:
    async def disturb() -> None:
        async with AsyncClient(served.address, timeout_s=120) as client:
            expected = [await _answer(client, prompt) for prompt in _PROMPTS]
            answers = [asyncio.create_task(_answer(client, prompt)) for prompt in _PROMPTS]
            await asyncio.sleep(0.3)
            with pytest.raises(ServerError, match="this request breaks the step that runs it, also alone"):
                await client.generate((1, poison_id, 2), max_tokens=8)
            assert await asyncio.gather(*answers) == expected

    asyncio.run(disturb())
