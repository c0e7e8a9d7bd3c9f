"""What every contestant has to do: requests with fixed token ids. The same seed gives the same workloads everywhere."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.protocol import Request

_NUM_SINGLE_PASSES = 5  # a single stream is short: its figures are medians of several
CONTEXT_LENS = (128, 512, 2048, 4096, 8128)
BATCH_SIZES = (1, 4, 16, 64, 256)
ARRIVAL_RATES = (1, 2, 4, 8)  # requests a second
_POISSON_S = 15.0  # for which requests of one rate arrive


@dataclass(frozen=True)
class Workload:
    """``requests`` are handed over when each is due, ``num_passes`` times one after the other.

    ``num_watched``: so many of the first requests are running decodes, and the others disturb them.
    ``needs_arrivals``: for runtimes only that take requests while others run.
    """

    name: str
    requests: tuple[Request, ...]
    num_passes: int = 1
    num_watched: int = 0

    @property
    def needs_arrivals(self) -> bool:
        return any(request.arrival_s > 0 for request in self.requests)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(request.total_len for request in self.requests)


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

    def size(self, number: int) -> int:
        return max(1, round(number * self.scale))

    def request(self, prompt_len: int, max_tokens: int, arrival_s: float = 0.0) -> Request:
        return Request(self.token_ids(prompt_len), max_tokens, arrival_s)

    def token_ids(self, num_tokens: int) -> list[int]:
        first_id = min(100, self.vocab_size // 4)  # below are special tokens
        return [self.rng.randrange(first_id, self.vocab_size) for _ in range(num_tokens)]


def _single(draw: _Draw) -> Workload:
    """One stream: prompt 128, output 128."""
    request = draw.request(draw.length(128, 128), draw.length(128, 128))
    return Workload("single", (request,), draw.count(_NUM_SINGLE_PASSES))


def _concurrent(draw: _Draw) -> Workload:
    """32 at the same time, 128/128 each."""
    requests = [draw.request(draw.length(128, 128), draw.length(128, 128)) for _ in range(draw.count(32))]
    return Workload("concurrent", tuple(requests))


def _sampled(draw: _Draw) -> Workload:
    """As ``concurrent``, with tokens drawn as chats have them."""
    requests = _concurrent(draw).requests
    return Workload(SAMPLED, tuple(dataclasses.replace(one, temperature=0.8, top_p=0.95) for one in requests))


def _mixed(draw: _Draw) -> Workload:
    """64 of mixed lengths: 16 to 512 in, 16 to 256 out."""
    requests = [draw.request(draw.length(16, 512), draw.length(16, 256)) for _ in range(draw.count(64))]
    return Workload("mixed", tuple(requests))


def _prompt(draw: _Draw) -> Workload:
    """One prompt of 2,048 tokens: how long until its first token."""
    return Workload("prompt-2048", (draw.request(draw.size(2048), 4),), 3)


def _long_prompts(draw: _Draw) -> Workload:
    """16 decodes run (128 in, 384 out); from the fourth second on 8 prompts of 2,048 arrive, one a second, 64 out."""
    running = [draw.request(draw.size(128), draw.size(384)) for _ in range(draw.size(16))]
    arriving = [draw.request(draw.size(2048), draw.size(64), (4.0 + at) * draw.scale) for at in range(draw.size(8))]
    return Workload("long-prompts", (*running, *arriving), num_watched=len(running))


def _shared_prefix(draw: _Draw) -> Workload:
    """32 at the same time that begin with the same 512 tokens: 32 of their own each, 64 out."""
    prefix = draw.token_ids(draw.size(512))
    own = [draw.request(draw.size(32), draw.size(64)) for _ in range(draw.size(32))]
    return Workload("shared-prefix", tuple(dataclasses.replace(one, prompt_ids=prefix + one.prompt_ids) for one in own))


def _poisson(rate: float, draw: _Draw) -> Workload:
    """Requests of 128/64 that arrive at random, ``rate`` a second, however many are still running."""
    requests, arrival_s = [], 0.0
    while (arrival_s := arrival_s + draw.rng.expovariate(rate)) < max(1.0, _POISSON_S * draw.scale):
        requests.append(draw.request(draw.size(128), draw.size(64), arrival_s))
    return Workload(f"poisson-{rate:g}", tuple(requests or [draw.request(draw.size(128), draw.size(64), 0.1)]))


def _context(prompt_len: int, draw: _Draw) -> Workload:
    """One stream behind a prompt of ``prompt_len``: what a decode step costs there."""
    return Workload(f"context-{prompt_len}", (draw.request(draw.size(prompt_len), draw.size(32)),))


def _batch(num_seqs: int, draw: _Draw) -> Workload:
    """``num_seqs`` at the same time, 32/48 each: what a decode step of so many costs."""
    requests = [draw.request(draw.size(32), draw.size(48)) for _ in range(draw.size(num_seqs))]
    return Workload(f"batch-{num_seqs}", tuple(requests))


MAIN = ("single", "concurrent", "mixed")
SAMPLED = "sampled"

WORKLOADS: dict[str, Callable[[_Draw], Workload]] = {
    "single": _single,
    "concurrent": _concurrent,
    "mixed": _mixed,
    SAMPLED: _sampled,
    "prompt-2048": _prompt,
    "long-prompts": _long_prompts,
    "shared-prefix": _shared_prefix,
    **{f"poisson-{rate}": partial(_poisson, rate) for rate in ARRIVAL_RATES},
    **{f"context-{prompt_len}": partial(_context, prompt_len) for prompt_len in CONTEXT_LENS},
    **{f"batch-{num_seqs}": partial(_batch, num_seqs) for num_seqs in BATCH_SIZES},
}


def make_workload(name: str, vocab_size: int, seed: int = 0, scale: float = 1.0) -> Workload:
    """``scale`` below 1 shortens prompts, outputs, counts and arrivals alike."""
    return WORKLOADS[name](_Draw(random.Random(f"{seed}/{name}"), vocab_size, scale))
