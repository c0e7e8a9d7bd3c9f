"""Which tokens survive top_k, top_p and min_p, found without sorting the vocabulary where a few candidates suffice.

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

# Candidates taken at first, and where that was not enough. A row goes on to the next width on its own account alone, so
# its result does not depend on its neighbours; past the last width it is sorted in full.
_WIDTHS = (64, 1024, 8192)
_ROWS_AT_ONCE = 32  # that are sorted in full; bounds the memory that their float64 weights take


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

    def take(self, rows: torch.Tensor) -> _Limits:
        return _Limits(*(column[rows] for column in self))


def is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def survivors(scores: torch.Tensor, params: Sequence[SamplingParams]) -> Iterator[Candidates]:
    """The candidates of every row, in groups of equal width.

    ``scores``: (num_rows, vocab_size) float32 after temperature, each row's maximum 0.
    """
    limits = _limits(scores, params)
    if scores.device.type == "cpu":
        yield from _of_growing_width(scores, limits)
    else:
        yield from _of_full_width(scores, limits)


def _of_growing_width(scores: torch.Tensor, limits: _Limits) -> Iterator[Candidates]:
    """A few candidates at first, and more for the rows of which that was not all. Looks at what it finds."""
    vocab_size = scores.shape[1]
    rows = torch.arange(len(scores), device=scores.device)
    for width in (*(width for width in _WIDTHS if width < vocab_size), vocab_size):
        best, token_ids = _best(scores, width)
        kept, complete = _filter(best, limits, vocab_size)
        done, open_rows = torch.nonzero(complete).view(-1), torch.nonzero(~complete).view(-1)
        if len(done):
            yield Candidates(rows[done].tolist(), best.masked_fill(~kept, -torch.inf)[done], token_ids[done])
        if not len(open_rows):
            return
        rows, scores, limits = rows[open_rows], scores[open_rows], limits.take(open_rows)


def _of_full_width(scores: torch.Tensor, limits: _Limits) -> Iterator[Candidates]:
    """The whole vocabulary, sorted: more work, but the host need not see any of it, and so does not wait."""
    for first in range(0, len(scores), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        best, token_ids = _best(scores[part], scores.shape[1])
        kept, _ = _filter(best, _Limits(*(column[part] for column in limits)), scores.shape[1])
        rows = range(first, first + len(best))
        yield Candidates(rows, best.masked_fill_(~kept, -torch.inf), token_ids)


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


def _best(scores: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` best scores of each row and their ids, best first, the lower id first among equals."""
    num_rows, vocab_size = scores.shape
    if width < vocab_size:
        token_ids = scores.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    else:
        token_ids = torch.arange(vocab_size, device=scores.device).expand(num_rows, vocab_size)
    best, order = scores.gather(1, token_ids).sort(dim=-1, descending=True, stable=True)
    return best, token_ids.gather(1, order)


def _filter(best: torch.Tensor, limits: _Limits, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of a row's ``best`` scores are kept (always the first few), and whether that is all of the row's.

    It is if every filter cuts above the lowest candidate: then nothing outside of the candidates matters, not even
    a token that ties with the last one kept.
    """
    lowest = best[:, -1:]
    kth = best.gather(1, limits.top_k.clamp(max=best.shape[1]) - 1)
    by_rank = limits.top_k < vocab_size
    kept = best >= kth
    weights = best.double().exp() * kept
    reached = weights.cumsum(dim=-1)
    mass = torch.where(by_rank, reached[:, -1:], limits.mass)
    kept &= reached - weights < limits.top_p * mass  # the mass of the tokens before it
    kept &= weights >= limits.min_p  # the first weight is 1
    if best.shape[1] == vocab_size:
        return kept, torch.ones_like(kept[:, 0])
    last_kept = best.gather(1, kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    complete = (last_kept > lowest) & (~by_rank | (kth > lowest))
    return kept, complete.view(-1)
