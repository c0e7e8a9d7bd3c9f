"""The inner loop of a product of 8-bit numbers, in LLVM: a few rows of x against 16 outputs or several times 16.

    x        rows of quads of int8 along K; each group of 64 has a scale, and a start: -128 times its sum
    weights  for each quad of K a vector of 16 words, or several: the quad of each output, as uint8, 128 above its value
    sums     (rows, outputs) float32, read, added to, written

Products of a group are added up as integers, from its start on, which takes the 128 away again: exactly, so in any
order and on any processor alike. Groups are added up in float32, in K's order, whatever the number of rows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardray.parallel.kernels import vector
from shardray.parallel.kernels.tile import Dot, Operand
from shardray.parallel.kernels.vector import FLOAT, FLOATS, I32, I64, VECTOR_BYTES, WIDTH, WORDS
from shardray.parallel.plan import INT8_GROUP

GROUP = INT8_GROUP
QUADS = GROUP // 4
_SHORTS = ir.VectorType(ir.IntType(16), 2 * WIDTH)


def _add_quads(builder: Any, sums: Any, x: Operand, weights: Operand) -> Any:
    return vector.call(builder, "llvm.x86.avx512.vpdpbusd.512", [sums, *weights, *x], WORDS)


def _constant(value: int) -> Any:
    return ir.Constant(WORDS, [value] * WIDTH)


def _split_weights(builder: Any, words: Any) -> Operand:
    """The first and third byte of each word as 16 bits, and the second and fourth"""
    odd = builder.and_(builder.lshr(words, _constant(8)), _constant(0x00FF00FF))
    return tuple(builder.bitcast(part, _SHORTS) for part in (builder.and_(words, _constant(0x00FF00FF)), odd))


def _split_x(builder: Any, word: Any) -> Operand:
    """Likewise of the same word for all outputs, with its signs"""
    shorts, eight = builder.bitcast(vector.splat(builder, word), _SHORTS), ir.Constant(_SHORTS, [8] * (2 * WIDTH))
    return builder.ashr(builder.shl(shorts, eight), eight), builder.ashr(shorts, eight)


def _add_shorts(builder: Any, sums: Any, x: Operand, weights: Operand) -> Any:
    """A product of uint8 and int8 fits into 16 bits."""
    for factor, values in zip(x, weights, strict=True):
        pairs = builder.bitcast(builder.mul(factor, values), WORDS)
        low = builder.ashr(builder.shl(pairs, _constant(16)), _constant(16))
        sums = builder.add(builder.add(sums, low), builder.ashr(pairs, _constant(16)))
    return sums


# One instruction of AVX-512 VNNI for sixteen quads.
QUADS_AT_ONCE = Dot(lambda builder, word: (vector.splat(builder, word),), lambda builder, words: (words,), _add_quads)
# On any processor.
SHORTS = Dot(_split_x, _split_weights, _add_shorts)


class _Tile:
    """Emits the loops over groups and over the quads of each, for one shape of tile."""

    def __init__(self, builder: Any, dot: Dot, num_rows: int, num_vectors: int) -> None:
        self._builder = builder
        self._dot = dot
        self._num_rows = num_rows
        self._num_vectors = num_vectors

    def emit(
        self, x: Any, scales: Any, starts: Any, row_bytes: Any, weights: Any, num_groups: Any, sums: Any, ahead: Any,
        ahead_step: Any,
    ) -> None:  # fmt: skip
        builder, count = self._builder, self._num_rows * self._num_vectors
        places = [builder.add(sums, I64(i * VECTOR_BYTES)) for i in range(count)]
        totals = [vector.register(builder, vector.load(builder, place, FLOATS)) for place in places]
        exact = [vector.register(builder, _constant(0)) for _ in range(count)]
        rows = [vector.offset(builder, x, row_bytes, r) for r in range(self._num_rows)]
        of_rows = [vector.offset(builder, I64(0), row_bytes, r) for r in range(self._num_rows)]
        with vector.loop(builder, num_groups) as group:
            at = [vector.offset(builder, place, group, 4) for place in of_rows]
            for r, place in enumerate(at):
                start = vector.splat(builder, vector.load(builder, builder.add(starts, place), I32))
                for register in exact[r * self._num_vectors : (r + 1) * self._num_vectors]:
                    builder.store(start, register)
            first = builder.mul(group, I64(QUADS))
            with vector.loop(builder, I64(QUADS)) as i:
                quad = builder.add(first, i)
                vector.prefetch_lines(builder, ahead, quad, ahead_step)
                self._add_quad(rows, weights, quad, exact)
            for r, place in enumerate(at):
                scale = vector.splat(builder, vector.load(builder, builder.add(scales, place), FLOAT))
                for i in range(r * self._num_vectors, (r + 1) * self._num_vectors):
                    values = builder.sitofp(builder.load(exact[i]), FLOATS)
                    builder.store(vector.multiply_add(builder, scale, values, builder.load(totals[i])), totals[i])
        for place, total in zip(places, totals, strict=True):
            vector.store(builder, builder.load(total), place)

    def _add_quad(self, rows: list[Any], weights: Any, quad: Any, exact: list[Any]) -> None:
        builder, dot = self._builder, self._dot
        at = vector.offset(builder, weights, quad, self._num_vectors * VECTOR_BYTES)
        columns = []
        for v in range(self._num_vectors):
            words = vector.load(builder, builder.add(at, I64(v * VECTOR_BYTES)), WORDS)
            columns.append(dot.prepare(builder, words))
        for r, row in enumerate(rows):
            factor = dot.spread(builder, vector.load(builder, vector.offset(builder, row, quad, 4), I32))
            for v, column in enumerate(columns):
                total = exact[r * self._num_vectors + v]
                builder.store(dot.add(builder, builder.load(total), factor, column), total)


def make_tile(dot: Dot, max_rows: int, block_vectors: int) -> Any:
    """A numba function over int64: (num_rows, num_vectors, x, scales, starts, row_bytes, weights, num_groups, sums,
    ahead, ahead_step).

    As that of tile.py. ``scales`` and ``starts`` are addresses of a float32 and an int32 for each group of the first
    row; of the next row all that is ``row_bytes`` further on.
    """
    shapes = [(vectors, rows) for vectors in sorted({1, block_vectors}) for rows in range(1, max_rows + 1)]
    by_key = {vectors * (max_rows + 1) + rows: (rows, vectors) for vectors, rows in shapes}

    @intrinsic
    def tile(
        typing_context: Any, num_rows: Any, num_vectors: Any, x: Any, scales: Any, starts: Any, row_bytes: Any,
        weights: Any, num_groups: Any, sums: Any, ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            num_rows, num_vectors, *rest = operands
            key = vector.offset(builder, num_rows, num_vectors, max_rows + 1)
            vector.choose(builder, key, by_key, lambda key: _Tile(builder, dot, *by_key[key]).emit(*rest))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return tile
