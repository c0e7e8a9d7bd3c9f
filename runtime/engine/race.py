"""Draws a token of each row with probability softmax(scores / temperature) among those that the filters keep.

The token drawn is the one whose weight over its noise is the highest: a row's result is a function of its scores, its
parameters and its key alone. On CPUs compiled, where numba is there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shardray.parallel.rows import NOT_FINITE, best_column
from shardray.runtime.engine.candidates import is_filtered, survivors
from shardray.runtime.engine.inputs import to_device
from shardray.runtime.engine.noise import exponential_noise
from shardray.runtime.engine.request import SamplingParams

if TYPE_CHECKING:
    from shardray.parallel.kernels.jit import Kernel

_LOWEST_TEMPERATURE = 1e-30  # a lower one would round to 0 in float32, and it makes no difference


class Choice(NamedTuple):
    """The winners of some rows of a batch."""

    rows: Sequence[int]  # indices into the batch
    scores: Tensor  # (n, width) over temperature, -inf where filtered; not so if no row wants logprobs
    token_ids: Tensor | None  # (n, width), None if the columns are the vocabulary
    columns: Tensor  # (n,) the column that won
    is_finite: Tensor  # (n,) bool: whether the highest score is, or minus infinity

    @property
    def tokens(self) -> Tensor:
        """(n,) int64, NOT_FINITE where the scores are not."""
        columns = self.columns
        tokens = columns if self.token_ids is None else self.token_ids.gather(1, columns[:, None]).view(-1)
        return torch.where(self.is_finite, tokens, NOT_FINITE)


def choose_greedily(scores: Tensor, rows: Sequence[int]) -> Choice:
    """The highest of each row, the lowest id among equals."""
    columns = best_column(scores)
    return Choice(rows, scores, None, columns.clamp_min(0), columns >= 0)


def choose_at_random(
    scores: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], keys: Sequence[tuple[int, int]],
    hashed_ids: Tensor, num_threads: int = 1,
) -> list[Choice]:  # fmt: skip
    """``scores``: (n, vocab_size) float32, of the ``rows``. ``hashed_ids``: those of the vocabulary."""
    kernel = prepare_draw(scores.device)
    if kernel is not None:
        return [_compiled_choice(kernel, scores, rows, params, keys, hashed_ids, num_threads)]
    is_finite = scores.amax(dim=-1) < torch.inf
    choices, tempered = [], _temper(scores, params)
    free = [place for place, p in enumerate(params) if not is_filtered(p)]
    filtered = [place for place, p in enumerate(params) if is_filtered(p)]
    if free:
        index = to_device(free, scores.device)
        own = tempered[index] if filtered else tempered
        columns = _race(own, [keys[place] for place in free], hashed_ids)
        choices.append(Choice([rows[place] for place in free], own, None, columns, is_finite[index]))
    if filtered:
        own = tempered[to_device(filtered, scores.device)] if free else tempered
        for places, best, token_ids in survivors(own, [params[place] for place in filtered]):
            found = [filtered[place] for place in places]
            columns = _race(best, [keys[place] for place in found], hashed_ids[token_ids])
            finite = is_finite[to_device(found, scores.device)]
            choices.append(Choice([rows[place] for place in found], best, token_ids, columns, finite))
    return choices


def _compiled_choice(
    kernel: Kernel, scores: Tensor, rows: Sequence[int], params: Sequence[SamplingParams],
    keys: Sequence[tuple[int, int]], hashed_ids: Tensor, num_threads: int,
) -> Choice:  # fmt: skip
    words = torch.tensor(keys, dtype=torch.int32)
    table = [(max(p.temperature, _LOWEST_TEMPERATURE), p.top_k, p.top_p, p.min_p) for p in params]
    numbers, scores = torch.tensor(table, dtype=torch.float64), scores.contiguous()
    columns, cuts = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows), 2, dtype=torch.float64)
    addresses = [tensor.data_ptr() for tensor in (scores, hashed_ids, words, numbers, columns, cuts)]
    kernel(min(num_threads, len(rows)), *scores.shape, *addresses)
    if any(p.logprobs is not None for p in params):
        tempered = _temper(scores, params)
        if any(map(is_filtered, params)):
            cut, last = cuts[:, :1], cuts[:, 1:]
            kept = (scores > cut) | ((scores == cut) & (torch.arange(scores.shape[1]) <= last))
            tempered.masked_fill_(~kept, -torch.inf)
        scores = tempered
    return Choice(rows, scores, None, columns, cuts[:, 1] >= 0.0)


def _temper(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores over temperature, shifted so that each row's maximum is 0 and nothing overflows."""
    temperatures = [[max(p.temperature, _LOWEST_TEMPERATURE)] for p in params]
    temperature = to_device(temperatures, scores.device, torch.float32)
    top = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    return (scores - top).div_(temperature)


def _race(scores: Tensor, keys: Sequence[tuple[int, int]], hashed_ids: Tensor) -> Tensor:
    """Draw a column of each row. ``hashed_ids``: those of the columns, of all rows or of each."""
    return scores.softmax(dim=-1).div_(exponential_noise(keys, hashed_ids)).argmax(dim=-1)


def prepare_draw(device: torch.device) -> Kernel | None:
    """What draws on a device; None: torch does."""
    return _compiled() if device.type == "cpu" else None


@functools.cache
def _compiled() -> Kernel | None:
    if importlib.util.find_spec("numba") is None:
        return None
    from shardray.runtime.engine.cpu_draw import compile_draw

    return compile_draw()
