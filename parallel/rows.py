"""Matrices whose rows follow one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
