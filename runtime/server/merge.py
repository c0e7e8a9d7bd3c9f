"""The requests of one call, side by side; their responses in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")


async def answer_all(
    requests: AsyncIterator[Request],
    answer: Callable[[Request], AsyncGenerator[Response]],
    max_under_way: int,
) -> AsyncGenerator[Response]:
    """Until all of ``requests`` are answered; left early, it closes every answer that is under way.

    No more than ``max_under_way`` are, the next request is read after that. Nothing is taken from an answer before the
    one response that is ready has been fetched, so that a slow reader has its responses merged where they are made.
    Raises what reading or an answer raises; the other answers are closed then.
    """
    ready: asyncio.Queue[Response | None] = asyncio.Queue(maxsize=1)
    places = asyncio.Semaphore(max_under_way)
    failures: list[Exception] = []

    async def answer_one(request: Request) -> None:
        try:
            async with contextlib.aclosing(answer(request)) as responses:
                async for response in responses:
                    await ready.put(response)
        finally:
            places.release()

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as answers:
                async for request in requests:
                    await places.acquire()
                    answers.create_task(answer_one(request))
        except* Exception as group:
            failures.extend(error for error in group.exceptions if isinstance(error, Exception))
        await ready.put(None)

    reading = asyncio.create_task(read_all())
    try:
        while (response := await ready.get()) is not None:
            yield response
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    if failures:
        raise failures[0]
