"""From traces to figures. Pure functions; times in seconds, rates per second."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.protocol import Trace

GOOD_TTFT_S = 0.5
GOOD_TPOT_S = 0.1  # the mean time between tokens of a request


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


def watched_figures(traces: Sequence[Trace], num_watched: int) -> dict[str, float]:
    """Between tokens of the first ``num_watched`` streams: until the first of the others comes, and while these run."""
    watched, others = traces[:num_watched], traces[num_watched:]
    if not watched or not others:
        return {}
    from_s, until_s = min(one.submitted_s for one in others), max(one.token_times_s[-1] for one in others)
    pairs = [pair for trace in watched for pair in itertools.pairwise(trace.token_times_s)]
    before = [later - earlier for earlier, later in pairs if later <= from_s]
    during = [later - earlier for earlier, later in pairs if later > from_s and earlier < until_s]
    return {
        "watched_itl_before_p50_s": percentile(before, 50),
        "watched_itl_p50_s": percentile(during, 50),
        "watched_itl_p99_s": percentile(during, 99),
        "watched_itl_max_s": max(during, default=0.0),
        "others_ttft_s": statistics.median(one.token_times_s[0] - one.submitted_s for one in others),
    }


def goodput_figures(traces: Sequence[Trace]) -> dict[str, float]:
    """Requests that had their first token in time and their others in time on average (arXiv 2401.09670)."""
    good = [trace for trace in traces if _is_good(trace)]
    arriving_s = max(trace.submitted_s for trace in traces) - min(trace.submitted_s for trace in traces)
    return {
        "good_share": len(good) / len(traces),
        "goodput_req_s": len(good) / arriving_s if arriving_s else 0.0,
        "offered_req_s": len(traces) / arriving_s if arriving_s else 0.0,
    }


def _is_good(trace: Trace) -> bool:
    times_s = trace.token_times_s
    between_s = (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)
    return times_s[0] - trace.submitted_s < GOOD_TTFT_S and between_s < GOOD_TPOT_S


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
