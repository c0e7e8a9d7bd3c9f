"""An operation from its start to its end: what it is at, told to its listener and shown in the fleet's status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.driver.operations import (
    OperationError,
    OperationKind,
    OperationProgress,
    OperationRefusedError,
    OperationStatus,
)

_log = logging.getLogger(__name__)
REPEAT_S = 2.0  # a step that takes longer is told again, with what it waits for

Say = Callable[[str, float], None]  # (what is done from now on, share of the operation that is done)


class OperationRun:
    """Runs ``work`` in a task of its own: it goes on when nobody listens. Use it in the fleet's loop."""

    def __init__(self, kind: OperationKind, fleet: Fleet, work: Callable[[Say], Awaitable[None]]) -> None:
        self.kind = kind
        self._fleet = fleet
        self._start_time_s = time.time()
        self._step = OperationProgress("starting", 0.0)
        self._step_began_s = time.monotonic()
        self._detail = ""
        self._told: asyncio.Queue[OperationProgress | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(work))
        self._task.add_done_callback(self._on_end)

    @property
    def is_under_way(self) -> bool:
        return not self._task.done()

    @property
    def doing(self) -> str:
        """The step at hand."""
        return self._step.doing

    def note(self, detail: str) -> None:
        """What the step at hand is waiting for; told when the step is told again."""
        self._detail = detail

    async def steps(self) -> AsyncIterator[OperationProgress]:
        """Every step, and again every ``REPEAT_S`` seconds that it takes; raises what the work raised. One listener."""
        while (step := await self._told.get()) is not None:
            yield step
        await asyncio.shield(self._task)

    async def cancel(self) -> None:
        """Break it off, if it has not ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, work: Callable[[Say], Awaitable[None]]) -> None:
        repeating = asyncio.create_task(self._repeat())
        try:
            await work(self._say)
            self._say("done", 1.0)
        finally:
            repeating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await repeating
            self._fleet.set_operation(None)
            self._told.put_nowait(None)

    def _say(self, doing: str, fraction: float) -> None:
        """The fraction never goes back, whatever the parts of an operation say of themselves."""
        _log.info("%s", doing)
        self._step, self._detail = OperationProgress(doing, max(fraction, self._step.fraction)), ""
        self._step_began_s = time.monotonic()
        self._tell(self._step)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(REPEAT_S)
            taken_s = time.monotonic() - self._step_began_s
            if taken_s >= REPEAT_S:
                detail = f": {self._detail}" if self._detail else ""
                doing = f"{self._step.doing}, for {taken_s:.0f} s{detail}"
                self._tell(OperationProgress(doing, self._step.fraction))

    def _tell(self, progress: OperationProgress) -> None:
        self._told.put_nowait(progress)
        self._fleet.set_operation(OperationStatus(self.kind, progress, self._start_time_s))

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Nobody may be there to hear of a failure, so the log does."""
        outcome = _outcome(task)
        self._fleet.count_operation(self.kind, outcome)
        if outcome == "failed":
            error = task.exception()
            _log.error("an operation failed: %s", error, exc_info=None if isinstance(error, OperationError) else error)


def _outcome(operation: asyncio.Task[None]) -> str:
    if operation.cancelled():
        return "cancelled"
    match operation.exception():
        case None:
            return "ok"
        case OperationRefusedError():
            return "refused"
    return "failed"
