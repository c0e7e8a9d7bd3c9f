"""What is timed to learn how fast a host's kernels are: products, attention, sums; prepared once, run several times.

They run as in decode steps: recorded, without Python between launches, where that can be.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardray.parallel.layers import Linear
from shardray.parallel.place import Member
from shardray.parallel.quantized import Weight, quantize
from shardray.parallel.shm import ShmComm
from shardray.parallel.waiting import Waiter
from shardray.parallel.workspace import Workspace
from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.model.attention import AttentionRow, KVPages, OwnHeads, PagedAttention, StepView, list_rows
from shardray.runtime.model.costs import Work, matrices, seen_tokens
from shardray.runtime.model.kernels import choose_ops, choose_recorder
from shardray.runtime.model.parameters import kind_parameters
from shardray.runtime.model.spec import DecoderSpec

Run = Callable[[], object]
_CPU = torch.device("cpu")
_COLD_BYTES = 192 << 20  # of weights: far above what caches keep
_NUM_LAYERS = 16  # of keys and values
_NUM_SUMS, _SLOT_BYTES, _TIMEOUT_S = 64, 4 << 20, 60.0


class ProductSample:
    """The products of a layer of the most common kind, with the weights of many; a small model stays in caches."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype) -> None:
        shapes, self.item_bytes = _product_shapes(spec), 1 if spec.in_int8 else dtype.itemsize  # of a weight
        of_layer = self.item_bytes * sum(rows * columns for rows, columns in shapes)
        count = min(-(-_COLD_BYTES // of_layer), spec.num_layers)
        self.num_bytes = count * of_layer
        self._dtype = dtype
        self._columns = [columns for _, columns in shapes] * count
        self._layers = [Linear(_some_weight(shape, dtype, spec.in_int8)) for shape in shapes * count]

    def prepare(self, num_tokens: int) -> Run:
        """For ``num_tokens`` at once."""
        inputs = {size: torch.ones(num_tokens, size, dtype=self._dtype) for size in {*self._columns}}
        workspace = Workspace()

        def run() -> None:
            with workspace.active():
                for layer, size in zip(self._layers, self._columns, strict=True):
                    workspace.new_turn()
                    layer(inputs[size])

        return _recorded(run)


def _some_weight(shape: tuple[int, int], dtype: torch.dtype, in_int8: bool) -> Weight:
    weight = torch.full(shape, 0.01, dtype=dtype)
    return quantize(weight) if in_int8 else weight


def _product_shapes(spec: DecoderSpec) -> list[tuple[int, int]]:
    """(outputs, inputs); what reads the same vector and is cut along its outputs is one product."""
    kind, _ = Counter(spec.layer_kinds).most_common(1)[0]
    merged: Counter[tuple[int, bool]] = Counter()
    for parameter in matrices(kind_parameters(spec, kind)):
        columns = parameter.shape[-1]
        is_row_parallel = any(split.dim == len(parameter.shape) - 1 for split in parameter.splits)
        merged[columns, is_row_parallel] += parameter.num_elements // columns
    return [(rows, columns) for (columns, _), rows in merged.items()]


class AttentionSample:
    """Attention of all heads over pages: rows of the first layer's kind, again and again with other pages.

    ``counts``: new tokens of each row; all have the same context, the new ones included. ``num_kv_heads``: instead of
    the model's, shared evenly by its heads.
    """

    def __init__(
        self, served: ServedSpec, counts: Sequence[int], context_len: int, num_kv_heads: int | None = None
    ) -> None:
        self._served, self._counts, self._context_len = served, counts, context_len
        spec = served.spec.attention
        self._spec = replace(spec, num_kv_heads=num_kv_heads or spec.num_kv_heads)
        seen = sum(seen_tokens(spec, count, context_len - count) for count in counts)
        read = 2.0 * spec.head_dim * self._spec.num_kv_heads * served.item_bytes * len(counts) * context_len
        self.work = _NUM_LAYERS * Work(4.0 * spec.head_dim * spec.num_heads * seen, read)

    def prepare(self, num_threads: int) -> Run:
        spec, dtype, block_size = self._spec, self._served.dtype, self._served.block_size
        kv_of_head = tuple(head * spec.num_kv_heads // spec.num_heads for head in range(spec.num_heads))
        attention = PagedAttention(spec, OwnHeads(kv_of_head, 0, spec.num_heads), _CPU)
        num_blocks = -(-self._context_len // block_size)
        num_pages = num_blocks * len(self._counts)
        pages = KVPages(_NUM_LAYERS, num_pages, block_size, spec.num_kv_heads, spec.head_dim, dtype, _CPU)
        pages.keys.zero_()
        pages.values.zero_()
        view = _view(self._counts, self._context_len, num_blocks)
        queries = torch.ones(sum(self._counts), spec.num_heads, spec.head_dim, dtype=dtype)
        ops, workspace = choose_ops(_CPU, dtype, num_threads), Workspace()

        def run() -> None:
            with workspace.active():
                for layer in range(_NUM_LAYERS):
                    workspace.new_turn()
                    ops.attend(attention, queries, pages, layer, view)

        return _recorded(run) if view.num_decodes else run


def _view(counts: Sequence[int], context_len: int, num_blocks: int) -> StepView:
    """Rows of one token, or rows of several."""
    num_rows, num_decodes = len(counts), counts.count(1)
    nothing = torch.zeros(sum(counts), dtype=torch.int64)
    tables = torch.arange(num_rows * num_blocks, dtype=torch.int32).view(num_rows, num_blocks)
    lens = torch.full((num_rows,), context_len, dtype=torch.int32)
    rows = tuple(AttentionRow(row, sum(counts[:row]), counts[row], context_len) for row in range(num_decodes, num_rows))
    return StepView(
        nothing, nothing, nothing, num_decodes, tables, lens, rows, nothing, row_list=list_rows(num_decodes, rows)
    )


class SumSample:
    """Sums of two ranks of this machine, one after the other."""

    num_sums = _NUM_SUMS

    def __init__(self) -> None:
        memory = mmap.mmap(-1, ShmComm.num_bytes(2, _SLOT_BYTES))
        members = [Member(rank, 0, rank) for rank in range(2)]
        self._comms = [
            ShmComm(memory, rank, 2, _SLOT_BYTES, Waiter(members, _TIMEOUT_S, threading.Event(), 0), "sample")
            for rank in range(2)
        ]

    def prepare(self, rank: int, size: int, dtype: torch.dtype) -> Run:
        """Both ranks have to be prepared, and run, at the same time."""
        x, comm = torch.zeros(size, dtype=dtype), self._comms[rank]

        def run() -> Tensor:
            for _ in range(_NUM_SUMS):
                comm.all_reduce(x)
            return x

        return _recorded(run)


def _recorded(run: Run) -> Run:
    run()
    recorder = choose_recorder(_CPU)
    program = None if recorder is None else recorder.record(run)[1]
    if program is None:
        return run

    def run_again() -> Run:
        program.run()
        return run  # which keeps what the program has the addresses of

    return run_again
