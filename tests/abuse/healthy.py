"""A client that does nothing wrong: one stream after the other, and the time between its tokens."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from statistics import quantiles
from typing import Any

from shardray.runtime.client import AsyncClient
from tests.abuse.worker import tell

_PROMPT = [5, 6, 7]
_NUM_WARM_UP = 3  # streams


async def attack(address: str, told: asyncio.Queue[str | None], max_tokens: int = 60) -> dict[str, Any]:
    """Tells when it has had its first streams. Each line that is told names the phase that begins; figures by phase."""
    gaps_s: dict[str, list[float]] = defaultdict(list)
    async with AsyncClient(address) as client:
        for _ in range(_NUM_WARM_UP):
            await client.generate(_PROMPT, max_tokens=max_tokens, ignore_eos=True, wait_s=30)
        tell({"is_warm": True})
        phase: str | None = await told.get()
        while phase is not None:
            last_s = time.monotonic()
            async for delta in client.stream(_PROMPT, max_tokens=max_tokens, ignore_eos=True, wait_s=30):
                now_s = time.monotonic()
                gaps_s[phase].append(now_s - last_s)
                gaps_s[phase].extend([0.0] * (len(delta.token_ids) - 1))
                last_s = now_s
            while not told.empty() and phase is not None:
                phase = told.get_nowait()
    return {name: _figures(gaps) for name, gaps in gaps_s.items()}


def _figures(gaps_s: list[float]) -> dict[str, float]:
    cuts = quantiles(gaps_s, n=100) if len(gaps_s) > 1 else [gaps_s[0]] * 99
    return {
        "num_tokens": len(gaps_s),
        "tokens_per_s": round(len(gaps_s) / sum(gaps_s), 1),
        "p50_ms": round(cuts[49] * 1000, 2),
        "p99_ms": round(cuts[98] * 1000, 2),
        "max_ms": round(max(gaps_s) * 1000, 1),
    }
