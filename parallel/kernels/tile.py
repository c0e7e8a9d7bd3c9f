"""The inner loop of a bfloat16 matrix product, in LLVM: a few rows of x against 16 outputs or several 16, in registers.

    x        rows of pairs of bfloat16 along K
    weights  for each pair of K a vector of 16 words, or several: the pair of each output
    sums     (rows, outputs) float32, read, added to, written

Every sum runs over K from its start to its end, pair by pair, whatever the number of rows: a row's result does not
depend on how many are computed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardray.parallel.kernels import vector
from shardray.parallel.kernels.vector import FLOAT, FLOATS, I32, I64, VECTOR_BYTES, WIDTH, WORDS

Operand = tuple[Any, ...]
Ahead = Callable[[Any], tuple[Any, Any, Any]]  # word of K -> (address, index, bytes an index): see prefetch_lines


class Dot(NamedTuple):
    """How pairs are multiplied and added to 16 sums."""

    spread: Callable[[Any, Any], Operand]  # (builder, word of x) -> what ``add`` takes
    prepare: Callable[[Any, Any], Operand]  # (builder, 16 words of weights) -> what ``add`` takes
    add: Callable[[Any, Any, Operand, Operand], Any]  # (builder, sums, x, weights) -> sums


def _add_pairs(builder: Any, sums: Any, x: Operand, weights: Operand) -> Any:
    return vector.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", [sums, *x, *weights], FLOATS)


def _halves(builder: Any, words: Any) -> Operand:
    """The first and the second of each pair, widened to float32."""
    is_vector = words.type == WORDS
    first, second = (ir.Constant(WORDS, [value] * WIDTH) if is_vector else I32(value) for value in (16, -0x10000))
    floats = FLOATS if is_vector else FLOAT
    return builder.bitcast(builder.shl(words, first), floats), builder.bitcast(builder.and_(words, second), floats)


def _spread_halves(builder: Any, word: Any) -> Operand:
    return tuple(vector.splat(builder, half) for half in _halves(builder, word))


def _add_halves(builder: Any, sums: Any, x: Operand, weights: Operand) -> Any:
    for factor, values in zip(x, weights, strict=True):
        sums = vector.multiply_add(builder, factor, values, sums)
    return sums


# One instruction of AVX-512 for sixteen pairs.
PAIRS = Dot(lambda builder, word: (vector.splat(builder, word),), lambda builder, words: (words,), _add_pairs)
# On any processor: two fused multiply-adds of what is widened to float32.
HALVES = Dot(_spread_halves, _halves, _add_halves)


class Tile:
    """Emits the loop over K for one shape of tile."""

    def __init__(self, builder: Any, dot: Dot, num_rows: int, num_vectors: int) -> None:
        self._builder = builder
        self._dot = dot
        self._num_rows = num_rows
        self._num_vectors = num_vectors

    def emit(
        self, x: Any, row_bytes: Any, weights: Any, num_words: Any, sums: Any, ahead: Any, ahead_step: Any
    ) -> None:
        builder = self._builder
        rows = [vector.offset(builder, x, row_bytes, r) for r in range(self._num_rows)]
        places = [builder.add(sums, I64(i * VECTOR_BYTES)) for i in range(self._num_rows * self._num_vectors)]
        totals = [vector.register(builder, vector.load(builder, place, FLOATS)) for place in places]
        self._emit_loop(rows, weights, num_words, totals, lambda word: (ahead, word, ahead_step))
        for place, total in zip(places, totals, strict=True):
            vector.store(builder, builder.load(total), place)

    def _emit_loop(self, rows: list[Any], weights: Any, num_words: Any, totals: list[Any], ahead: Ahead) -> None:
        """Add all words of K to the totals; before each, fetch what ``ahead`` says."""
        with vector.loop(self._builder, num_words) as word:
            vector.prefetch_lines(self._builder, *ahead(word))
            self._add_word([vector.offset(self._builder, row, word, 4) for row in rows], weights, word, totals)

    def _add_word(self, places: list[Any], weights: Any, word: Any, totals: list[Any]) -> None:
        """``places``: of that word of K in each row"""
        builder, dot = self._builder, self._dot
        at = vector.offset(builder, weights, word, self._num_vectors * VECTOR_BYTES)
        columns = []
        for v in range(self._num_vectors):
            words = vector.load(builder, builder.add(at, I64(v * VECTOR_BYTES)), WORDS)
            columns.append(dot.prepare(builder, words))
        for r, place in enumerate(places):
            factor = dot.spread(builder, vector.load(builder, place, I32))
            for v, column in enumerate(columns):
                total = totals[r * self._num_vectors + v]
                builder.store(dot.add(builder, builder.load(total), factor, column), total)


def make_tile(dot: Dot, max_rows: int, block_vectors: int, kind: type[Tile] = Tile) -> Any:
    """A numba function over int64: (num_rows, num_vectors, x, row_bytes, weights, num_words, sums, ahead, ahead_step).

    1 <= num_rows <= max_rows; num_vectors is block_vectors or 1. ``x``, ``weights``, ``sums`` and ``ahead`` are
    addresses; rows of x are ``row_bytes`` apart; a word of K is a pair. On its way the tile prefetches from ``ahead``
    on, ``ahead_step`` bytes for each word: 0, 64 or 128. ``kind`` emits it.
    """
    shapes = [(vectors, rows) for vectors in sorted({1, block_vectors}) for rows in range(1, max_rows + 1)]
    by_key = {vectors * (max_rows + 1) + rows: (rows, vectors) for vectors, rows in shapes}

    @intrinsic
    def tile(
        typing_context: Any, num_rows: Any, num_vectors: Any, x: Any, row_bytes: Any, weights: Any, num_words: Any,
        sums: Any, ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            num_rows, num_vectors, *rest = operands
            key = vector.offset(builder, num_rows, num_vectors, max_rows + 1)
            vector.choose(builder, key, by_key, lambda key: kind(builder, dot, *by_key[key]).emit(*rest))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return tile
