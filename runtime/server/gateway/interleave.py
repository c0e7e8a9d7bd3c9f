"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def interleave(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """(index of the stream, item), each as soon as it is there; one item a stream is fetched ahead, no more.

    The first error of a stream ends it, and is raised. Close it before you close the streams.
    """
    if len(streams) == 1:  # without a task for each item
        async for item in streams[0]:
            yield 0, item
        return
    fetching = {_fetch(stream): index for index, stream in enumerate(streams)}
    try:
        while fetching:
            done, _ = await asyncio.wait(fetching, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=fetching.__getitem__):
                index = fetching.pop(task)
                for item in task.result():
                    fetching[_fetch(streams[index])] = index
                    yield index, item
    finally:
        for task in fetching:
            task.cancel()
        await asyncio.gather(*fetching, return_exceptions=True)


def _fetch(stream: AsyncIterator[T]) -> asyncio.Task[list[T]]:
    async def fetch() -> list[T]:
        """The next item; none at the end."""
        try:
            return [await anext(stream)]
        except StopAsyncIteration:
            return []

    return asyncio.ensure_future(fetch())
