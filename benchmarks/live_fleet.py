"""A served fleet with a stream that never ends, for measurements of what happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any

from shardray.runtime.client import AsyncClient

_PROMPT_IDS = tuple(range(5, 69))
_MAX_TOKENS = 1500
_SETTINGS = {"engine.device": "cpu", "engine.kv_memory_bytes": "256MiB", "grpc.listen": "127.0.0.1:0"}

Events = Mapping[str, asyncio.Queue[dict[str, Any]]]  # what `shardray serve --json` tells, by the kind of event


class EndlessStream:
    """A stream that never ends, and when its tokens came."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.arrivals_s: list[float] = []
        self._task = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def until(self, num_tokens: int) -> None:
        while len(self.arrivals_s) < num_tokens:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.01)

    def end_of_pause(self, since_s: float) -> float:
        """When the longest pause that ended after ``since_s`` did."""
        gaps = [(later - earlier, later) for earlier, later in itertools.pairwise(self.arrivals_s) if later > since_s]
        return max(gaps)[1]

    async def _read(self) -> None:
        while True:
            options: dict[str, Any] = {"temperature": 0.0, "max_tokens": _MAX_TOKENS, "ignore_eos": True}
            async for delta in self._client.stream(_PROMPT_IDS, **options):
                self.arrivals_s += [time.time()] * len(delta.token_ids)


@contextlib.asynccontextmanager
async def serving(
    settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[str, Events]]:
    """The address of a server on this machine, and what it tells. ``environment``: added to this process's."""
    words = [word for key, value in {**_SETTINGS, **settings}.items() for word in ("--set", f"{key}={value}")]
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shardray", "serve", "--json", *words,
        stdout=asyncio.subprocess.PIPE, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    events: defaultdict[str, asyncio.Queue[dict[str, Any]]] = defaultdict(asyncio.Queue)
    reading = asyncio.create_task(_read_events(server, events))
    try:
        ready = asyncio.create_task(events["serving"].get())
        await asyncio.wait([ready, reading], return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise RuntimeError("shardray serve ended before it served")
        yield ready.result()["address"], events
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.terminate()
        await asyncio.gather(server.wait(), reading)


async def _read_events(server: asyncio.subprocess.Process, events: Events) -> None:
    assert server.stdout is not None
    async for line in server.stdout:
        event = json.loads(line)
        events[event["event"]].put_nowait(event)
