"""What every contestant has to do: requests with fixed token ids. The same seed gives the same workloads everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.protocol import Request

_NUM_SINGLE_PASSES = 5  # a single stream is short: its figures are medians of several


@dataclass(frozen=True)
class Workload:
    """``requests`` are handed over at once, ``num_passes`` times one after the other."""

    name: str
    requests: tuple[Request, ...]
    num_passes: int


@dataclass(frozen=True)
class _Draw:
    """Draws requests. ``scale`` shortens everything, to try the harness out."""

    rng: random.Random
    vocab_size: int
    scale: float

    def count(self, number: int) -> int:
        return max(2, round(number * self.scale))

    def length(self, low: int, high: int) -> int:
        return max(2, round(self.rng.randint(low, high) * self.scale))

    def request(self, prompt_len: int, max_tokens: int) -> Request:
        first_id = min(100, self.vocab_size // 4)  # below are special tokens
        return Request([self.rng.randrange(first_id, self.vocab_size) for _ in range(prompt_len)], max_tokens)


def _single(draw: _Draw) -> Workload:
    """One stream: prompt 128, output 128."""
    request = draw.request(draw.length(128, 128), draw.length(128, 128))
    return Workload("single", (request,), draw.count(_NUM_SINGLE_PASSES))


def _concurrent(draw: _Draw) -> Workload:
    """32 at the same time, 128/128 each."""
    requests = [draw.request(draw.length(128, 128), draw.length(128, 128)) for _ in range(draw.count(32))]
    return Workload("concurrent", tuple(requests), 1)


def _mixed(draw: _Draw) -> Workload:
    """64 of mixed lengths: 16 to 512 in, 16 to 256 out."""
    requests = [draw.request(draw.length(16, 512), draw.length(16, 256)) for _ in range(draw.count(64))]
    return Workload("mixed", tuple(requests), 1)


WORKLOADS: dict[str, Callable[[_Draw], Workload]] = {"single": _single, "concurrent": _concurrent, "mixed": _mixed}


def make_workload(name: str, vocab_size: int, seed: int = 0, scale: float = 1.0) -> Workload:
    """``scale`` below 1 shortens prompts, outputs and counts alike."""
    return WORKLOADS[name](_Draw(random.Random(f"{seed}/{name}"), vocab_size, scale))
