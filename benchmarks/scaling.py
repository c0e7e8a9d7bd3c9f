"""How long a stream pauses while the counts of its fleet change."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from benchmarks.live_fleet import EndlessStream, serving
from shardray.runtime.client import AsyncClient

TARGET_S = 1.0  # where there is room for the new mesh beside the old one
_TOKENS_BEFORE = _TOKENS_AFTER = 50


@dataclass(frozen=True)
class ScalePause:
    """One change of shape, in seconds. Shapes are "tensor x pipeline"."""

    before: str
    after: str
    operation_s: float  # until the operator was told that it is done
    pause_s: float  # the longest time without a token during it
    gap_s: float  # the median time between two tokens before it


@dataclass(frozen=True)
class ScalingSetup:
    """What is measured: from each shape to the next, under one stream."""

    model: str
    dtype: str
    shapes: tuple[tuple[int, int], ...]  # (tensor, pipeline)
    num_threads: int  # of each host


async def measure(setup: ScalingSetup) -> AsyncIterator[ScalePause]:
    """One result for each change."""
    tp_size, pp_size = setup.shapes[0]
    settings = {
        "model.source": setup.model,
        "model.dtype": setup.dtype,
        "parallel.tensor_parallel_size": tp_size,
        "parallel.pipeline_parallel_size": pp_size,
        "engine.threads_per_host": setup.num_threads,
    }
    async with serving(settings) as (address, _), AsyncClient(address) as client:
        for before, after in itertools.pairwise(setup.shapes):
            stream = EndlessStream(client)
            try:
                yield await _scale(client, stream, before, after)
            finally:
                await stream.close()


async def _scale(
    client: AsyncClient, stream: EndlessStream, before: tuple[int, int], after: tuple[int, int]
) -> ScalePause:
    await stream.until(_TOKENS_BEFORE)
    began_s, num_before = time.time(), len(stream.arrivals_s)
    async for _ in client.scale(tensor_parallel_size=after[0], pipeline_parallel_size=after[1]):
        pass
    ended_s = time.time()
    await stream.until(len(stream.arrivals_s) + _TOKENS_AFTER)
    arrivals_s = stream.arrivals_s
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(arrivals_s)]
    return ScalePause(
        before=_name(before),
        after=_name(after),
        operation_s=ended_s - began_s,
        pause_s=max(gaps_s[num_before - 1 :]),
        gap_s=statistics.median(gaps_s[: num_before - 1]),
    )


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def to_table(pauses: Sequence[ScalePause]) -> str:
    """Markdown: a row for each change, and how the longest pause compares with the target."""
    worst_s = max(one.pause_s for one in pauses)
    return "\n".join(
        [
            "| from | to | operation | longest pause | gap before |",
            "| --- | --- | ---: | ---: | ---: |",
            *(f"| {p.before} | {p.after} | {p.operation_s:.2f} | {p.pause_s:.2f} | {p.gap_s:.3f} |" for p in pauses),
            "",
            f"Seconds. Target: pauses below {TARGET_S:g} s; {'met' if worst_s < TARGET_S else 'missed'}.",
        ]
    )
