"""A step's inputs: named arrays on the host, and the same as tensors on the device, brought there by one copy.

They are declared once. To add one: a field of ``StepInputs``, the line in ``slots.py`` that fills it, and its padding
below.

Legend: T tokens of the step, R rows, S sampling rows, b tokens a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from shardray.runtime.model.kernels.splits import max_splits

LAST_TOKEN = -1  # in ``token_ids``: the token that the row's slot sampled last, which only the device knows
_ALIGNMENT = 16  # bytes
_TORCH_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}

Array = np.ndarray[Any, np.dtype[Any]]
A = TypeVar("A")


class StepInputs(NamedTuple, Generic[A]):
    """What changes from step to step, as arrays of the host or as tensors of the device."""

    token_ids: A  # (T,) int64, or LAST_TOKEN
    positions: A  # (T,) int64
    cache_index: A  # (T,) int64: page * b + offset
    slots: A  # (R,) int64
    context_lens: A  # (R,) int32, this step's tokens included
    sampled_tokens: A  # (S,) int64: tokens of the step whose logits are wanted
    sampling_slots: A  # (S,) int64: whose tokens those are
    block_tables: A  # (R, blocks) int32
    # For kernels on CUDA alone, as in AttentionTasks:
    splits: A | None = None  # (W, 2) int32
    split_starts: A | None = None  # (D + 1,) int32, of D rows of one token
    tiles: A | None = None  # (N, 2) int32
    query_starts: A | None = None  # (R + 1,) int32


_STARTS = ("split_starts", "query_starts")  # of which one more than rows


@dataclass(frozen=True)
class DecodeShape:
    """Of a step of ``num_rows`` rows, each of one token that samples.

    Rows that only fill it up read and write a page and a slot that nobody else has. For kernels they have no context,
    the reference needs one token of it. The scratch page follows those of the sequences.
    """

    num_rows: int
    max_blocks: int
    block_size: int
    scratch_page: int
    scratch_slot: int
    has_tasks: bool = False  # for kernels on CUDA

    @property
    def max_splits(self) -> int:
        return max_splits(self.num_rows, self.max_blocks * self.block_size, self.scratch_page * self.block_size)


def _padding(shape: DecodeShape) -> StepInputs[Array]:
    """A step of that shape in which every row only fills it up."""

    def each(value: int, dtype: type = np.int64) -> Array:
        return np.full(shape.num_rows, value, dtype)

    inputs = StepInputs(
        token_ids=each(0),
        positions=each(0),
        cache_index=each(shape.scratch_page * shape.block_size),
        slots=each(shape.scratch_slot),
        context_lens=each(0 if shape.has_tasks else 1, np.int32),
        sampled_tokens=np.arange(shape.num_rows),
        sampling_slots=each(shape.scratch_slot),
        block_tables=np.full((shape.num_rows, shape.max_blocks), shape.scratch_page, np.int32),
    )
    if not shape.has_tasks:
        return inputs
    starts = np.zeros(shape.num_rows + 1, np.int32)
    splits, tiles = np.zeros((shape.max_splits, 2), np.int32), np.zeros((0, 2), np.int32)
    return inputs._replace(splits=splits, split_starts=starts, tiles=tiles, query_starts=starts)


class Layout:
    """Where each of some arrays lies in one buffer."""

    def __init__(self, arrays: StepInputs[Array]) -> None:
        self._places: list[tuple[slice, Any, tuple[int, ...]]] = []
        end = 0
        for array in _present(arrays):
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + array.nbytes
            self._places.append((slice(begin, end), array.dtype, array.shape))
        self.num_bytes = max(1, end)

    def arrays(self, buffer: Tensor) -> StepInputs[Array]:
        """Those in a buffer of the host."""
        whole = buffer.numpy()
        return StepInputs(*(whole[place].view(dtype).reshape(shape) for place, dtype, shape in self._places))

    def tensors(self, buffer: Tensor) -> StepInputs[Tensor]:
        """The same in a buffer of any device."""
        views = (buffer[place].view(_TORCH_DTYPES[dtype]).view(shape) for place, dtype, shape in self._places)
        return StepInputs(*views)


def _present(arrays: StepInputs[Array]) -> list[Array]:
    """Those that there are: all, or all but the last ones."""
    return [array for array in arrays if array is not None]


def upload(arrays: StepInputs[Array], device: torch.device) -> StepInputs[Tensor]:
    """Bring a step's inputs to the device; does not wait for it. On a CPU they stay where they are."""
    if device.type == "cpu":
        return StepInputs(*map(torch.from_numpy, _present(arrays)))
    layout = Layout(arrays)
    # torch does not hand this memory out again before the copy out of it is done.
    host = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=True)
    for target, array in zip(_present(layout.arrays(host)), _present(arrays), strict=True):
        target[...] = array
    return layout.tensors(host.to(device, non_blocking=True))


def to_device(values: Array | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of anything on the host; does not wait for the device. An array stays where it is on a CPU."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class StaticInputs:
    """Inputs of a decode step that stay where they are, so that what was recorded over them can run again."""

    def __init__(self, shape: DecodeShape, device: torch.device, num_buffers: int) -> None:
        """``num_buffers``: one more than the steps that may be on their way at once."""
        self._padding = _padding(shape)
        self._max_splits = shape.max_splits
        layout = Layout(self._padding)
        self._on_device = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        self.tensors = layout.tensors(self._on_device)
        self._buffers = [_HostBuffer(layout, self._padding, device) for _ in range(num_buffers)]
        self._turn = 0
        self._buffers[0].send(self._on_device)

    def has_room_for(self, arrays: StepInputs[Array]) -> bool:
        """Whether the contexts of a step of as many rows or fewer fit: those that share pages may be too long."""
        return arrays.splits is None or len(arrays.splits) <= self._max_splits

    def fill(self, arrays: StepInputs[Array]) -> None:
        """Put a step that there is room for in; the other rows are padding. One copy, which is not waited for."""
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer.wait_until_read()
        for target, array, padding in zip(*map(_present, (buffer.arrays, arrays, self._padding)), strict=True):
            count = len(array)
            target[(slice(count), *map(slice, array.shape[1:]))] = array
            target[count:] = padding[count:]
        for name in _STARTS if arrays.splits is not None else ():  # rows that only fill up have nothing
            starts = getattr(arrays, name)
            getattr(buffer.arrays, name)[len(starts) :] = starts[-1]
        buffer.send(self._on_device)


class _HostBuffer:
    """What one copy brings to the device. Columns that a step leaves alone hold what an earlier one put there."""

    def __init__(self, layout: Layout, padding: StepInputs[Array], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._memory = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.arrays = layout.arrays(self._memory)
        for target, array in zip(_present(self.arrays), _present(padding), strict=True):
            target[...] = array
        self._read = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def wait_until_read(self) -> None:
        if self._read is not None:
            self._read.synchronize()

    def send(self, target: Tensor) -> None:
        target.copy_(self._memory, non_blocking=True)
        if self._read is not None:
            self._read.record()


def decode_sizes(max_rows: int) -> tuple[int, ...]:
    """Rows of the decode steps that are recorded, the fewest first; a step of any number runs in the next of them."""
    sizes = (1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, max_rows, 32))
    return (*(size for size in sizes if size < max_rows), max_rows)
