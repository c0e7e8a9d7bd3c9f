"""Which tokens survive top_k, top_p and min_p, found by sorting the vocabulary.

On the way the host looks at nothing, so that it need not wait for the device. On CPUs ``cpu_draw.py`` does without.

The rules and their order are those of ``transformers``: top_k keeps every token that ties with the k-th; top_p keeps
the smallest set of most likely tokens whose probability reaches it; min_p drops what is below min_p times the most
likely one. Each filter sees the probabilities that the one before it left. Where top_p cuts through equal scores the
lower ids stay (``transformers`` leaves that to its sort).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from shardray.runtime.engine.inputs import to_device
from shardray.runtime.engine.request import SamplingParams

_ROWS_AT_ONCE = 32  # that are sorted; bounds the memory that their float64 weights take


class Candidates(NamedTuple):
    """The best tokens of some rows, best first; the filtered ones have score -inf."""

    rows: Sequence[int]  # indices into the rows given
    scores: torch.Tensor  # (n, width)
    token_ids: torch.Tensor  # (n, width)


class _Limits(NamedTuple):
    """The filters of each row as columns, with values that filter nothing where a filter is off."""

    top_k: torch.Tensor  # (n, 1) int64, vocab_size where off
    mass: torch.Tensor  # (n, 1) float64: unnormalized probability at which top_p cuts, if top_k is off
    top_p: torch.Tensor  # (n, 1) float64, inf where off
    min_p: torch.Tensor  # (n, 1) float64


def is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def survivors(scores: torch.Tensor, params: Sequence[SamplingParams]) -> Iterator[Candidates]:
    """The candidates of every row, in groups.

    ``scores``: (num_rows, vocab_size) float32 after temperature, each row's maximum 0.
    """
    for first in range(0, len(scores), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        best, token_ids = scores[part].sort(dim=-1, descending=True, stable=True)  # the lower id first among equals
        kept = _kept(best, _limits(scores[part], params[part]))
        yield Candidates(range(first, first + len(best)), best.masked_fill_(~kept, -torch.inf), token_ids)


def _limits(scores: torch.Tensor, params: Sequence[SamplingParams]) -> _Limits:
    vocab_size = scores.shape[1]
    top_k = [[min(p.top_k, vocab_size) if p.top_k else vocab_size] for p in params]
    top_p = [[p.top_p if p.top_p < 1.0 else torch.inf] for p in params]
    min_p = [[p.min_p] for p in params]
    # The most likely token has weight exp(0) = 1, so all weights together are the inverse of its probability. Softmax,
    # because it sums each row alike whatever the number of rows.
    total = scores.softmax(dim=-1).amax(dim=-1, keepdim=True).double().reciprocal()
    as_double = partial(to_device, device=scores.device, dtype=torch.float64)
    return _Limits(to_device(top_k, scores.device, torch.int64), total, as_double(top_p), as_double(min_p))


def _kept(best: torch.Tensor, limits: _Limits) -> torch.Tensor:
    """Which of a row's scores, best first, are kept: always the first few."""
    kept = best >= best.gather(1, limits.top_k - 1)
    weights = best.double().exp() * kept
    reached = weights.cumsum(dim=-1)
    mass = torch.where(limits.top_k < best.shape[1], reached[:, -1:], limits.mass)
    kept &= reached - weights < limits.top_p * mass  # the mass of the tokens before it
    return kept & (weights >= limits.min_p)  # the first weight is 1
