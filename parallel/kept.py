"""Where weights lie that are kept as they are computed with: in a segment that is shared, while one is active.

Loaders and layers ask for their memory here, each in its turn, and say how it is filled. What is in a shared segment
already is not filled again, so it need not be read either.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from shardray.parallel.segment import Fill, Segment, own_tensor

_active = threading.local()


@contextmanager
def keeping_in(segment: Segment | None) -> Iterator[None]:
    """What this thread asks ``keep`` for lies in ``segment`` meanwhile; None: in memory of this process."""
    before = _segment()
    _active.segment = segment
    try:
        yield
    finally:
        _active.segment = before


def keep(shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> Tensor:
    """A contiguous tensor on the CPU as ``fill`` fills it. Nobody may write to it afterwards."""
    segment = _segment()
    return own_tensor(shape, dtype, fill) if segment is None else segment.place(shape, dtype, fill)


def is_there_already() -> bool:
    """Whether another process has filled all that this thread asks for."""
    segment = _segment()
    return segment is not None and segment.is_filled


def _segment() -> Segment | None:
    return getattr(_active, "segment", None)
