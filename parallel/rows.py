"""Rows of matrices: joined, taken and filled in, and the best column of each. On CPUs compiled, where numba is there.

Legend: T rows that are asked for, V columns.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardray.parallel.workspace import empty

if TYPE_CHECKING:
    from shardray.parallel.kernels.rows import Kernels

NOT_FINITE = -1  # instead of a column: a score of the row is infinite or NaN


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` along the first dimension; no copy is made of parts that lie one after the other already."""
    first, end = parts[0], parts[0].storage_offset()
    memory = first.untyped_storage().data_ptr()
    for part in parts:
        follows = part.is_contiguous() and part.storage_offset() == end and part.untyped_storage().data_ptr() == memory
        if not follows or part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def take_rows(table: Tensor, index: Tensor, first: int | None = None) -> Tensor:
    """``table[index]``, (T, ...). With ``first`` the table's rows are numbered from there on, and others are zeros."""
    kernels = _kernels(table.device)
    if kernels is not None and table.is_contiguous() and table.element_size() > 1:
        out = empty((len(index), *table.shape[1:]), table.dtype)
        row_bytes = table[:1].nbytes if len(table) else out[:1].nbytes
        addresses = table.data_ptr(), out.data_ptr()
        kernels.take_rows(1, len(index), row_bytes, index.data_ptr(), first or 0, len(table), *addresses)
        return out
    if first is None:
        return table.index_select(0, index)
    if len(table) == 0:
        return table.new_zeros(len(index), *table.shape[1:])
    local = index - first
    foreign = (local < 0) | (local >= len(table))
    taken = table.index_select(0, local.masked_fill(foreign, 0))
    return taken.masked_fill_(foreign.view(-1, *[1] * (taken.dim() - 1)), 0.0)


def put_words(table: Tensor, index: Tensor, values: Tensor) -> None:
    """``table[index] = values``, all int64 and (T,); no row twice. 0 instead of values below."""
    kernels = _kernels(table.device)
    if kernels is None:
        table.index_copy_(0, index, values.clamp_min(0))
    else:
        kernels.put_words(1, len(index), index.data_ptr(), values.data_ptr(), table.data_ptr())


def fill_in(values: Tensor, missing: int, table: Tensor, index: Tensor) -> Tensor:
    """``values``, and where they are ``missing`` those of ``table[index]``: all int64, (T,).

    ``index`` may be shorter; what comes behind its end is not missing.
    """
    kernels = _kernels(table.device)
    if kernels is not None:
        out = torch.empty_like(values)
        addresses = values.data_ptr(), index.data_ptr(), table.data_ptr(), out.data_ptr()
        kernels.fill_in(1, len(values), missing, *addresses)
        return out
    own = values[: len(index)]
    known = torch.where(own == missing, table.index_select(0, index), own)
    return known if len(known) == len(values) else torch.cat((known, values[len(index) :]))


def best_columns(scores: Tensor, first: int) -> Tensor:
    """(T, V) float32 -> (T, 2) float64: the highest score of each row, and its column, numbered from ``first`` on.

    Of equal ones the first column; without columns minus infinity. A NaN counts as the highest.
    """
    num_rows, num_columns = scores.shape
    kernels = _kernels(scores.device)
    if kernels is not None:
        scores, out = scores.contiguous(), torch.empty((num_rows, 2), dtype=torch.float64)
        num_threads = max(1, min(num_rows, torch.get_num_threads()))
        kernels.best_columns(num_threads, num_rows, num_columns, first, scores.data_ptr(), out.data_ptr())
        return out
    if num_columns == 0:
        return torch.tensor([-torch.inf, first], dtype=torch.float64, device=scores.device).expand(num_rows, 2)
    best, columns = scores.max(dim=1)
    return torch.stack((best.double(), (columns + first).double()), dim=1)


def pick_best(pairs: Tensor) -> Tensor:
    """(ranks, T, 2) of ``best_columns`` -> (T,) int64: the column of the highest score, of equal ones the first.

    NOT_FINITE where that score is infinite or NaN.
    """
    num_ranks, num_rows, _ = pairs.shape
    kernels = _kernels(pairs.device)
    if kernels is not None:
        pairs, out = pairs.contiguous(), torch.empty(num_rows, dtype=torch.int64)
        kernels.pick_best(1, num_ranks, num_rows, pairs.data_ptr(), out.data_ptr())
        return out
    scores, ranks = pairs[:, :, 0].max(dim=0)
    columns = pairs[ranks, torch.arange(num_rows, device=pairs.device), 1].long()
    return torch.where(scores < torch.inf, columns, NOT_FINITE)


def best_column(scores: Tensor) -> Tensor:
    """(T, V) float32 -> (T,) int64: the column of each row's highest score, of equal ones the first, or NOT_FINITE."""
    if _kernels(scores.device) is None:
        best, columns = scores.max(dim=1)
        return torch.where(best < torch.inf, columns, NOT_FINITE)
    return pick_best(best_columns(scores, 0)[None])


def prepare_rows(device: torch.device) -> None:
    """Make ready what the functions above run on a device."""
    _kernels(device)


def _kernels(device: torch.device) -> Kernels | None:
    return _compiled() if device.type == "cpu" else None


@functools.cache
def _compiled() -> Kernels | None:
    if importlib.util.find_spec("numba") is None:
        return None
    from shardray.parallel.kernels.rows import compile_rows

    return compile_rows()
