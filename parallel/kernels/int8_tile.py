"""The inner loop of a product of 8-bit numbers, in LLVM: a few rows of x against 16 outputs or several times 16.

    x        rows of groups along K: [float32 scale] [int32 start: -128 times its sum] [64 int8, in quads]
    weights  for each quad of K a vector of 16 words, or several: the quad of each output, as uint8, 128 above its value
    sums     (rows, outputs) float32, read, added to, written

Products of a group are added up as integers, from its start on, which takes the 128 away again: exactly, so in any
order and on any processor alike. Groups are added up in float32, in K's order, whatever the number of rows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from shardray.parallel.kernels import vector
from shardray.parallel.kernels.tile import Ahead, Dot, Operand, Tile
from shardray.parallel.kernels.vector import FLOAT, FLOATS, I32, I64, WIDTH, WORDS
from shardray.parallel.plan import INT8_GROUP

GROUP = INT8_GROUP
QUADS = GROUP // 4
START_AT, VALUES_AT = 4, 8  # in a group of x, behind its scale
GROUP_BYTES = VALUES_AT + GROUP
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


class Int8Tile(Tile):
    """Emits the loops over groups and over the quads of each, for one shape of tile."""

    def _emit_loop(self, rows: list[Any], weights: Any, num_words: Any, totals: list[Any], ahead: Ahead) -> None:
        builder, vectors = self._builder, self._num_vectors
        exact = [vector.register(builder, _constant(0)) for _ in totals]
        with vector.loop(builder, builder.udiv(num_words, I64(QUADS))) as group:
            at = [vector.offset(builder, row, group, GROUP_BYTES) for row in rows]
            for r, place in enumerate(at):
                start = vector.splat(builder, vector.load(builder, builder.add(place, I64(START_AT)), I32))
                for register in exact[r * vectors : (r + 1) * vectors]:
                    builder.store(start, register)
            first, values = builder.mul(group, I64(QUADS)), [builder.add(place, I64(VALUES_AT)) for place in at]
            with vector.loop(builder, I64(QUADS)) as i:
                quad = builder.add(first, i)
                vector.prefetch_lines(builder, *ahead(quad))
                self._add_word([vector.offset(builder, place, i, 4) for place in values], weights, quad, exact)
            for r, place in enumerate(at):
                scale = vector.splat(builder, vector.load(builder, place, FLOAT))
                for i in range(r * vectors, (r + 1) * vectors):
                    found = builder.sitofp(builder.load(exact[i]), FLOATS)
                    builder.store(vector.multiply_add(builder, scale, found, builder.load(totals[i])), totals[i])
