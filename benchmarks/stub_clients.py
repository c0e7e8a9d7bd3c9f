"""Streams without an end from one process: a connection carries about a thousand at most. Tells how many tokens came.

python -m benchmarks.stub_clients ADDRESS NUM_STREAMS
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

from shardray.runtime.client import AsyncClient

MAX_STREAMS = 500  # of one process
_MAX_TOKENS = 400
_PROMPT = tuple(range(10, 30))
_TELL_S = 0.1
_OPENED_PER_S = 250  # a server turns away calls of which more than a thousand come before it has looked at the first


async def main(address: str, num_streams: int) -> None:
    """Prints when, tokens so far, and streams that have had some, until a stream fails."""
    counts = [0] * num_streams
    async with AsyncClient(address, timeout_s=600) as client, asyncio.TaskGroup() as streams:
        for index in range(num_streams):
            streams.create_task(_read(client, counts, index))
        while True:
            print(time.perf_counter(), sum(counts), sum(map(bool, counts)), flush=True)
            await asyncio.sleep(_TELL_S)


async def _read(client: AsyncClient, counts: list[int], index: int) -> None:
    await asyncio.sleep(index / _OPENED_PER_S)
    while True:
        async for delta in client.stream(_PROMPT, max_tokens=_MAX_TOKENS, temperature=0.0, ignore_eos=True):
            counts[index] += len(delta.token_ids)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)  # streams that are cut off have nothing more to say


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
