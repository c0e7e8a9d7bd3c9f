"""The compiled part of a matrix product (see parallel/kernels/linear.py): which thread multiplies what, when.

A task is some blocks of outputs for a span of tokens. While a block is multiplied with one tile of tokens after the
other, its weights and the tokens stay in the second-level cache, for at most ``_PASS`` words of K at a time, and the
weights of the next block are fetched. With a single tile there is nothing to hide that behind, and memory streams best
undisturbed.

Legend: T tokens, N outputs, K inputs, of which a word of 4 bytes holds two or four.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars, names bound when a kernel is compiled)

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from shardray.parallel.kernels import jit, vector
from shardray.parallel.kernels.vector import VECTOR_BYTES, WIDTH

_PASS = 1024  # words of K
_SPAN_BYTES = 256 << 10  # of x
_TASKS_A_THREAD = 8


class Variant(NamedTuple):
    """The product of one kind of numbers on one kind of processor: what the names below stand for.

    The functions are numba's, over int64. ``a``: the arguments of ``product``; what ends in ``_at`` is an address.
    """

    name: str
    block_vectors: int  # of 16 outputs, side by side in a block of weights
    max_rows: int  # of a tile: as many as there are registers for their sums
    multiply: object  # see tile.py
    row_bytes: object  # (words of K) -> bytes of so many of a row, as ``multiply`` takes it
    num_scratch: object  # (rows, words of K) -> words that ``ready`` needs for so many
    ready: object  # (a, first token, rows, scratch_at) -> where ``multiply`` finds them
    begin: object  # (a, first vector, vectors, rows, sums_at)
    end: object  # (a, first vector, vectors, rows, sums_at)


# Replaced by those of a variant
block_vectors, max_rows, multiply, row_bytes, num_scratch, ready, begin, end = 0, 0, *[None] * 6


@numba.njit(inline="always")
def _tasks(num_tokens, num_words, num_blocks, num_threads, max_rows):
    """(tokens of a span, spans, blocks of a task, whole tasks of a span, tasks of a span)

    Spans are of about the same size, in whole tiles. A thread alone takes all blocks at once; several get tasks enough
    that a slower core takes fewer. Where there are few blocks and threads do not divide them, what is left over is cut
    by tokens as well: those tasks, one for each thread and block, come after the whole ones.
    """
    num_spans = (num_tokens - 1) // max(_SPAN_BYTES // (4 * min(num_words, _PASS)), max_rows) + 1
    span = min(((num_tokens - 1) // num_spans // max_rows + 1) * max_rows, num_tokens)
    num_spans = (num_tokens - 1) // span + 1
    blocks_a_task = max(num_blocks * num_spans // (_TASKS_A_THREAD * num_threads), 1) if num_threads > 1 else num_blocks
    num_left = num_blocks % num_threads if blocks_a_task == 1 and span > max_rows * num_threads else 0
    num_whole = (num_blocks - num_left - 1) // blocks_a_task + 1 if num_blocks > num_left else 0
    return span, num_spans, blocks_a_task, num_whole, num_whole + num_left * num_threads


@numba.njit(inline="always")
def block_at(index, num_vectors, block_vectors):
    """(first vector, number of vectors): whole blocks come first, then blocks of a single vector."""
    num_whole = num_vectors // block_vectors
    if index < num_whole:
        return index * block_vectors, block_vectors
    return num_whole * block_vectors + index - num_whole, 1


@numba.njit(inline="always")
def count_blocks(num_vectors, block_vectors):
    return num_vectors // block_vectors + num_vectors % block_vectors


@numba.njit(inline="always")
def _write(words, num_columns, out, place, as_float32):
    """The first columns of one row of sums, as float32 or rounded to bfloat16, into ``out`` from ``place`` on."""
    source, whole = vector.address_of(words), num_columns // WIDTH
    if as_float32:
        vector.copy(source, whole, out + place * 4)
    else:
        vector.narrow(source, whole, out + place * 2)
    done = whole * WIDTH
    if done < num_columns:
        if as_float32:
            jit.copy_out(words[done:], num_columns - done, jit.pointer_u32(out), place + done)
        else:
            jit.narrow(words[done:], num_columns - done, jit.pointer_u16(out), place + done)


def product(args):
    """args: T, x, out, threads, N, words of K, weights, bias, whether out is float32, and what else a variant takes.

    out = x @ weights + bias: x is (T, K), out (T, N) bfloat16 or float32, bias float32, padded like the weights.
    """
    a = numba.carray(args, (13,))
    num_tokens, out, num_threads, num_outputs, num_words, weights = a[1], a[3], a[4], a[5], a[6], a[7]
    num_vectors = (num_outputs - 1) // WIDTH + 1
    num_blocks = count_blocks(num_vectors, block_vectors)
    span, num_spans, blocks_a_task, whole_tasks, tasks_a_span = _tasks(
        num_tokens, num_words, num_blocks, num_threads, max_rows
    )
    last, span_here, rows_at, bytes_a_row = num_blocks - 1, -1, 0, row_bytes(num_words)
    num_sums = span * block_vectors * WIDTH
    # First the float32 sums of the tokens of a span and one block
    words = np.empty(num_sums + num_scratch(span, num_words), np.uint32)
    sums_at = vector.address_of(words)
    while True:
        task = jit.take_task(args)
        if task >= num_spans * tasks_a_span:
            break
        first_token, place = task // tasks_a_span * span, task % tasks_a_span
        num_rows, first_row = min(span, num_tokens - first_token), 0
        if span_here != first_token:
            span_here, rows_at = first_token, ready(a, first_token, num_rows, sums_at + num_sums * 4)
        if place < whole_tasks:
            first_block = place * blocks_a_task
            last_block = min(first_block + blocks_a_task, num_blocks)
        else:
            part = (place - whole_tasks) % num_threads
            first_block = whole_tasks + (place - whole_tasks) // num_threads
            last_block = first_block + 1
            first_row = num_rows * part // num_threads
            num_rows = num_rows * (part + 1) // num_threads - first_row
        num_tiles = (num_rows - 1) // max_rows + 1
        for block in range(first_block, last_block):
            # Next comes the next block; at the end of a task, as long as threads keep pace, that of so many tasks on
            following = block + 1 if block + 1 < last_block else min(first_block + num_threads * blocks_a_task, last)
            start, vectors = block_at(block, num_vectors, block_vectors)
            then, _ = block_at(following, num_vectors, block_vectors)
            width = vectors * WIDTH
            lines = min((vectors - 1) // num_tiles + 1, 2) if num_tiles > 1 else 0  # prefetched for each word
            begin(a, start, vectors, num_rows, sums_at)
            for first_word in range(0, num_words, _PASS):
                count = min(_PASS, num_words - first_word)
                here = weights + (start * num_words + vectors * first_word) * VECTOR_BYTES
                there = weights + (then * num_words + vectors * first_word) * VECTOR_BYTES
                for tile in range(num_tiles):
                    row, next_row = num_rows * tile // num_tiles, num_rows * (tile + 1) // num_tiles
                    multiply(
                        next_row - row, vectors, rows_at + (first_row + row) * bytes_a_row + row_bytes(first_word),
                        bytes_a_row, here, count, sums_at + row * width * 4,
                        there + min(tile * lines, vectors - lines) * count * VECTOR_BYTES, lines * VECTOR_BYTES,
                    )  # fmt: skip
            end(a, start, vectors, num_rows, sums_at)
            num_columns = min(width, num_outputs - start * WIDTH)
            for i in range(num_rows):
                at = (first_token + first_row + i) * num_outputs + start * WIDTH
                _write(words[i * width : (i + 1) * width], num_columns, out, at, a[9] != 0)
