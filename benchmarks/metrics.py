"""From traces to figures. Pure functions; times in seconds, rates per second."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.protocol import Trace


@dataclass(frozen=True)
class PassFigures:
    """What one pass over a workload shows."""

    decode_tok_s: float  # of one stream after its first token; the median over the streams
    output_tok_s: float  # of all streams, from hand-over to the last token
    total_tok_s: float  # prompt tokens counted too
    ttft_s: float  # median over the streams
    ttft_p99_s: float
    itl_p50_s: float  # between tokens of one stream
    itl_p99_s: float


def pass_figures(traces: Sequence[Trace], num_prompt_tokens: int) -> PassFigures:
    wall_s = max(trace.token_times_s[-1] for trace in traces) - min(trace.submitted_s for trace in traces)
    num_output_tokens = sum(len(trace.token_ids) for trace in traces)
    first_s = [trace.token_times_s[0] - trace.submitted_s for trace in traces]
    gaps_s = [later - earlier for trace in traces for earlier, later in itertools.pairwise(trace.token_times_s)]
    return PassFigures(
        decode_tok_s=statistics.median(_decode_rate(trace) for trace in traces),
        output_tok_s=num_output_tokens / wall_s,
        total_tok_s=(num_prompt_tokens + num_output_tokens) / wall_s,
        ttft_s=statistics.median(first_s),
        ttft_p99_s=percentile(first_s, 99),
        itl_p50_s=percentile(gaps_s, 50),
        itl_p99_s=percentile(gaps_s, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)] if ordered else 0.0


def digest(traces: Sequence[Trace]) -> str:
    """Equal for equal tokens."""
    return hashlib.sha256(repr([trace.token_ids for trace in traces]).encode()).hexdigest()[:16]


def agreement(traces: Sequence[Trace], reference: Sequence[Trace]) -> dict[str, float]:
    """How far the tokens of two contestants go together. In 16-bit dtypes near ties part even correct ones."""
    prefixes = [_common_prefix(own.token_ids, other.token_ids) for own, other in zip(traces, reference, strict=True)]
    same = [own.token_ids == other.token_ids for own, other in zip(traces, reference, strict=True)]
    return {"identical_share": sum(same) / len(same), "mean_common_prefix": statistics.fmean(prefixes)}


def _decode_rate(trace: Trace) -> float:
    times_s = trace.token_times_s
    took_s = times_s[-1] - times_s[0]
    return (len(times_s) - 1) / took_s if took_s > 0 else 0.0


def _common_prefix(own: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, other, strict=False)))
