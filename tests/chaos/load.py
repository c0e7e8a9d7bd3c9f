"""The steady load: clients that ask one request after the other, some of which leave before the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from random import Random

from shardray.runtime.client import AsyncClient, ServerError
from tests.chaos.cases import Case
from tests.chaos.compare import Answer, Verdict, judge
from tests.chaos.report import Report

_LEAVING_SHARE = 0.15
_LONGEST_VISIT_S = 2.0  # of a client that leaves
_LONGEST_PAUSE_S = 0.3  # of a client between two requests
_STREAM_TIMEOUT_S = 240.0
_LONG_PAUSE_S = 0.25  # a recovery, most likely


async def ask(client: AsyncClient, case: Case, leave_after_s: float | None = None) -> tuple[Answer, float]:
    """The answer, and the longest time in which nothing came. ``leave_after_s``: when the client goes, if it has to."""
    answer, pause_s, last_s = Answer(), 0.0, time.monotonic()
    # Not resumable: a stream that the server breaks must show.
    deltas = client.stream(case.prompt, timeout_s=_STREAM_TIMEOUT_S, resumable_s=0.0, **case.options)
    try:
        async with asyncio.timeout(leave_after_s):
            async for delta in deltas:
                waited_s, last_s = time.monotonic() - last_s, time.monotonic()
                if waited_s > _LONG_PAUSE_S:
                    answer.pauses.append((len(answer.token_ids), round(waited_s, 2)))
                pause_s = max(pause_s, waited_s)
                answer.add(delta)
    except TimeoutError:
        answer.was_left = True
    except ServerError as error:
        answer.error = str(error)
    finally:
        await deltas.aclose()
    return answer, max(pause_s, time.monotonic() - last_s)


async def ask_all(client: AsyncClient, cases: Sequence[Case], num_at_once: int) -> dict[Case, Answer]:
    """Every case once. Raises RuntimeError for one that fails."""
    free = asyncio.Semaphore(num_at_once)

    async def one(case: Case) -> Answer:
        async with free:
            answer, _ = await ask(client, case)
        if answer.error is not None:
            raise RuntimeError(f"{case.name} fails undisturbed: {answer.error}")
        return answer

    return dict(zip(cases, await asyncio.gather(*map(one, cases)), strict=True))


class Load:
    """``num_clients`` of them, each on a connection of its own."""

    def __init__(self, address: str, expected: Mapping[Case, Answer], num_clients: int, seed: int, report: Report):
        self._address = address
        self._expected = expected
        self._report = report
        self._enough = asyncio.Event()
        self._clients = [
            asyncio.create_task(self._client(f"client {number}", Random(f"{seed}/{number}")))
            for number in range(num_clients)
        ]

    async def stop(self, timeout_s: float) -> None:
        """Let the streams at hand end."""
        self._enough.set()
        _, late = await asyncio.wait(self._clients, timeout=timeout_s)
        for client in late:
            client.cancel()
            self._report.problem(f"a stream did not end within {timeout_s:g} s after the last fault")
        for error in await asyncio.gather(*self._clients, return_exceptions=True):
            if isinstance(error, Exception):
                self._report.problem(f"a client failed: {error!r}")

    async def _client(self, name: str, rng: Random) -> None:
        cases = list(self._expected)
        async with AsyncClient(self._address) as client:
            while not self._enough.is_set():
                case = rng.choice(cases)
                leave_after_s = rng.uniform(0, _LONGEST_VISIT_S) if rng.random() < _LEAVING_SHARE else None
                answer, pause_s = await ask(client, case, leave_after_s)
                verdict, detail = judge(answer, self._expected[case])
                who = f"{case.name} of {name}"
                self._report.stream(who, verdict, detail, len(answer.token_ids), pause_s, answer.was_left)
                if verdict is not Verdict.SAME:
                    self._report.say(f"  prompt {case.prompt}, {case.options}, pauses before {answer.pauses}")
                    self._report.say(f"  got {answer.token_ids}, expected {self._expected[case].token_ids}")
                    self._report.say(f"  logprobs {answer.logprobs}, expected {self._expected[case].logprobs}")
                await asyncio.sleep(rng.uniform(0, _LONGEST_PAUSE_S))
