"""Who runs what: the sets of runs that docs/performance.md is made from."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.workloads import ARRIVAL_RATES, BATCH_SIZES, CONTEXT_LENS, MAIN

_ONE, _TP2, _PP2 = "shardray:threads=1", "shardray:tp=2,threads=1", "shardray:pp=2,threads=1"
_POISSON = tuple(f"poisson-{rate}" for rate in ARRIVAL_RATES)
_CONTEXTS = tuple(f"context-{prompt_len}" for prompt_len in CONTEXT_LENS)
_BATCHES = tuple(f"batch-{num_seqs}" for num_seqs in BATCH_SIZES)


@dataclass(frozen=True)
class Suite:
    """``tasks``: labels, and the workloads of each of them."""

    what: str
    tasks: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    num_rounds: int = 1


SUITES = {
    "targets": Suite(
        "what the targets ask for",
        (
            (("shardray",), (*MAIN, "prompt-2048", "long-prompts")),
            (("served",), ("single", "concurrent")),
            (("vllm", "openvino", "llama.cpp", "transformers"), (*MAIN, "prompt-2048")),
            (("transformers-cb",), ("single", "concurrent")),
            ((_ONE, _TP2, _PP2), ("single", "concurrent")),
        ),
        num_rounds=2,
    ),
    "arrivals": Suite(
        "requests that come while others run, and prefixes that they share",
        (
            (("shardray",), (*_POISSON, "shared-prefix")),
            (("served",), _POISSON),
            (("vllm", "openvino"), (*_POISSON, "long-prompts")),
            (("vllm:prefix=1", "openvino:prefix=1"), ("shared-prefix",)),
        ),
    ),
    "growth": Suite(
        "a step's cost against batch, context and shards",
        (
            (("shardray",), (*_CONTEXTS, *_BATCHES)),
            ((_ONE, _TP2, _PP2), ("context-128", "context-2048", *_BATCHES[:-1])),
        ),
    ),
}
