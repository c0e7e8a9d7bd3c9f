"""The faults of a chaos run: which one, when and on whom is drawn from the seed; who that hits is up to the moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from random import Random

from shardray.runtime.client import AsyncClient, Progress, ServerError
from tests.chaos.health import FleetView
from tests.chaos.report import Report
from tests.chaos.served import Served

SHAPES = tuple((tp_size, pp_size) for tp_size in (1, 2, 3) for pp_size in (1, 2))
_REPLICAS = (1, 2)
_AFTERSHOCK_SHARE = 0.35  # of the faults come while the fleet is busy with the one before
_LONGEST_AFTERSHOCK_S = 1.5
_LONGEST_PAUSE = 3.0  # times the pace
_OPERATION_TIMEOUT_S = 90.0
_EXPECTED_CODES = ("ABORTED", "FAILED_PRECONDITION", "INTERNAL")  # conflict, refusal, gone back


class Faults:
    """Injects one fault after the other; ``pace_s`` lies between two of them on average, aftershocks apart.

    ``shapes``: tensor and pipeline ranks that the fleet is scaled to.
    """

    def __init__(
        self, served: Served, client: AsyncClient, view: FleetView, seed: int, pace_s: float, report: Report,
        shapes: Sequence[tuple[int, int]] = SHAPES,
    ) -> None:  # fmt: skip
        self._served = served
        self._client = client
        self._view = view
        self._rng = Random(f"{seed}/faults")
        self._pace_s = pace_s
        self._report = report
        self._shapes = shapes
        self._operations: set[asyncio.Task[None]] = set()
        self._kinds: dict[Callable[[], Awaitable[None]], float] = {
            self._kill: 5,
            self._kill_leader: 2,
            self._kill_several: 2,
            self._kill_spare: 1,
            self._hang: 2,
            self._hang_several: 0.5,
            self._scale: 3,
            self._restart: 1,
        }

    async def inject(self, duration_s: float) -> None:
        """Go on for that long, then wait for the operations under way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                while True:
                    await asyncio.sleep(self._pause_s())
                    (fault,) = self._rng.choices(list(self._kinds), list(self._kinds.values()))
                    await fault()
        if self._operations:
            _, late = await asyncio.wait(self._operations, timeout=_OPERATION_TIMEOUT_S)
            if late:
                self._report.problem(f"{len(late)} operations did not end within {_OPERATION_TIMEOUT_S:g} s")

    def _pause_s(self) -> float:
        if self._rng.random() < _AFTERSHOCK_SHARE:
            return self._rng.uniform(0, _LONGEST_AFTERSHOCK_S)
        return min(self._rng.expovariate(1 / self._pace_s), _LONGEST_PAUSE * self._pace_s)

    async def _kill(self) -> None:
        self._hit("kill", signal.SIGKILL, await self._hosts(), 1)

    async def _kill_leader(self) -> None:
        leaders = [pid for pid in await self._hosts() if self._view.is_leader(pid)]
        self._hit("kill leader", signal.SIGKILL, leaders, 1)

    async def _kill_several(self) -> None:
        pids = await self._hosts()
        self._hit("kill several", signal.SIGKILL, pids, self._rng.randint(2, max(2, len(pids))))

    async def _kill_spare(self) -> None:
        spares = [pid for pid in await self._hosts() if not self._view.is_shard(pid)]
        self._hit("kill spare", signal.SIGKILL, spares, 1)

    async def _hang(self) -> None:
        self._hit("hang", signal.SIGSTOP, await self._hosts(), 1)

    async def _hang_several(self) -> None:
        pids = await self._hosts()
        self._hit("hang several", signal.SIGSTOP, pids, self._rng.randint(2, max(2, len(pids))))

    async def _scale(self) -> None:
        tp_size, pp_size = self._rng.choice(self._shapes)
        replicas = self._rng.choice(_REPLICAS)
        steps = self._client.scale(tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, replicas=replicas)
        self._start("scale", f"tensor {tp_size} × pipeline {pp_size} × {replicas}", steps)

    async def _restart(self) -> None:
        self._start("restart", "every host", self._client.restart())

    async def _hosts(self) -> list[int]:
        return sorted(await asyncio.to_thread(self._served.host_pids))

    def _hit(self, kind: str, number: signal.Signals, pids: list[int], count: int) -> None:
        chosen = self._rng.sample(pids, min(count, len(pids)))
        if not chosen:
            return
        one = "a hang" if number is signal.SIGSTOP else "a kill"
        for pid in chosen:
            self._view.note_fault(pid, one if len(chosen) == 1 else "several at once")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        self._report.fault(kind, "; ".join(self._view.describe(pid) for pid in chosen))

    def _start(self, kind: str, what: str, steps: AsyncGenerator[Progress, None]) -> None:
        self._report.fault(kind, what)
        task = asyncio.create_task(self._follow(f"{kind} to {what}", steps))
        self._operations.add(task)
        task.add_done_callback(self._operations.discard)

    async def _follow(self, what: str, steps: AsyncGenerator[Progress, None]) -> None:
        try:
            async for _ in steps:
                pass
        except ServerError as error:
            line = f"{what}: {error.code}: {error}"
            (self._report.say if error.code in _EXPECTED_CODES else self._report.problem)(line)
        else:
            self._report.say(f"{what}: done")
