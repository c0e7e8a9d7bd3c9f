"""Who runs what: the sets of runs that docs/performance.md is made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.workloads import ARRIVAL_RATES, BATCH_SIZES, CONTEXT_LENS, MAIN, SAMPLED

_ONE, _TP2, _PP2 = "shardray:threads=1", "shardray:tp=2,threads=1", "shardray:pp=2,threads=1"
_POISSON = tuple(f"poisson-{rate}" for rate in ARRIVAL_RATES)
_CONTEXTS = tuple(f"context-{prompt_len}" for prompt_len in CONTEXT_LENS)
_BATCHES = tuple(f"batch-{num_seqs}" for num_seqs in BATCH_SIZES)


Tasks = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]  # labels, and the workloads of each of them


@dataclass(frozen=True)
class Heat:
    """Who takes turns with whom, and how often; all of them are loaded at once."""

    tasks: Tasks
    num_rounds: int = 1


@dataclass(frozen=True)
class Suite:
    """Heats, one after the other."""

    what: str
    heats: tuple[Heat, ...]

    @property
    def tasks(self) -> Tasks:
        return tuple(task for heat in self.heats for task in heat.tasks)

    def numbered(self, num_rounds: int | None = None) -> Iterator[tuple[Heat, range]]:
        """Each heat with the numbers of its rounds; ``num_rounds`` of them instead of what it has."""
        first = 0
        for heat in self.heats:
            rounds = range(first, first + (num_rounds or heat.num_rounds))
            yield heat, rounds
            first = rounds.stop


SUITES = {
    "targets": Suite(
        "what the targets ask for",
        (
            Heat(
                (
                    (("shardray",), (*MAIN, SAMPLED, "prompt-2048", "long-prompts")),
                    (("openvino", "llama.cpp", "vllm", "transformers"), (*MAIN, SAMPLED, "prompt-2048")),
                    (("transformers-cb",), ("single", "concurrent")),
                ),
                num_rounds=4,
            ),
            Heat(((("shardray", "served", _ONE, _TP2, _PP2), ("single", "concurrent")),), num_rounds=4),
        ),
    ),
    "arrivals": Suite(
        "requests that come while others run, and prefixes that they share",
        (
            Heat(
                (
                    (("shardray",), _POISSON),
                    (("served",), _POISSON),
                    (("vllm", "openvino"), (*_POISSON, "long-prompts")),
                    # Its own default, small as shardray's: prompts hold streams up less, and wait longer.
                    (("openvino:batch=256",), ("long-prompts",)),
                    (("shardray:prefix=1", "vllm:prefix=1", "openvino:prefix=1"), ("shared-prefix",)),
                ),
            ),
        ),
    ),
    "growth": Suite(
        "a step's cost against batch, context and shards",
        (
            Heat(
                (
                    (("shardray",), (*_CONTEXTS, *_BATCHES)),
                    ((_ONE, _TP2, _PP2), ("context-128", "context-2048", *_BATCHES[:-1])),
                ),
            ),
        ),
    ),
}
