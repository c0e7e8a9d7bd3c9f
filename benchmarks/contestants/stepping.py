"""Serving with a runtime that is driven step by step: requests are added when they are due. Standard library only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from benchmarks.contestants.base import now_s
from benchmarks.protocol import Request, Trace


class Stepper(Protocol):
    """A runtime with a step loop. Requests go by their place in the list that is served."""

    def add(self, index: int, request: Request) -> None:
        """Take a request; it is served from the next step on."""

    def step(self) -> Iterable[tuple[int, list[int]]]:
        """Compute once; the new tokens of each request that got some."""


def serve_by_steps(stepper: Stepper, requests: list[Request]) -> list[Trace]:
    """Each request is added at its ``arrival_s``; sleeps only while there is nothing to compute."""
    began_s = now_s()
    traces = [Trace(began_s + request.arrival_s) for request in requests]
    coming = deque(sorted(range(len(requests)), key=lambda index: requests[index].arrival_s))
    num_running = 0
    while coming or num_running:
        while coming and traces[coming[0]].submitted_s <= now_s():
            index = coming.popleft()
            stepper.add(index, requests[index])
            num_running += 1
        if not num_running:
            time.sleep(max(0.0, traces[coming[0]].submitted_s - now_s()))
            continue
        for index, token_ids in stepper.step():
            traces[index].add(token_ids, now_s())
            num_running -= len(traces[index].token_ids) == requests[index].max_tokens
    return traces
