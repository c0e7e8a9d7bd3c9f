"""The product of bfloat16 with bfloat16: rows of x are read where they lie."""

# mypy: ignore-errors
# (numba's dialect)

from __future__ import annotations

import functools
from typing import NamedTuple

import numba

from shardray.parallel.kernels import vector
from shardray.parallel.kernels.product import Variant
from shardray.parallel.kernels.tile import HALVES, PAIRS, make_tile
from shardray.parallel.kernels.vector import VECTOR_BYTES


@numba.njit(inline="always")
def _row_bytes(num_words):
    return num_words * 4


@numba.njit(inline="always")
def _num_scratch(num_rows, num_words):
    return 0


@numba.njit(inline="always")
def _ready(a, first_token, num_rows, scratch_at):
    return a[2] + first_token * a[6] * 4


@numba.njit(inline="always")
def _begin(a, first_vector, vectors, num_rows, sums_at):
    for i in range(num_rows):
        vector.copy(a[8] + first_vector * VECTOR_BYTES, vectors, sums_at + i * vectors * VECTOR_BYTES)


@numba.njit(inline="always")
def _end(a, first_vector, vectors, num_rows, sums_at):
    pass


class PairsTile(NamedTuple):
    """See tile.py."""

    block_vectors: int
    max_rows: int
    multiply: object


@functools.cache
def make_pairs_tile(name: str) -> PairsTile:
    """``pairs``: AVX-512 that multiplies bfloat16. ``halves``: any AVX-512. ``narrow``: less room in registers."""
    vectors, rows = (2, 2) if name == "narrow" else (4, 6)
    return PairsTile(vectors, rows, make_tile(PAIRS if name == "pairs" else HALVES, rows, vectors))


@functools.cache
def make_variant(name: str) -> Variant:
    """Named as its tile is."""
    return Variant(name, *make_pairs_tile(name), _row_bytes, _num_scratch, _ready, _begin, _end)
