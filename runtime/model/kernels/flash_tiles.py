"""The steps of a flash attention between its matrix products, in LLVM: sixteen floats or pairs of bfloat16 at a time.

A block of keys is taken at a time (arXiv 2205.14135). Of each row are kept the highest score so far, the sum of its
weights, and the sum of values under these weights; whenever a higher score comes, the last two shrink. What a row gets
comes from that row alone, in the order of the blocks.

All operands are int64: addresses and counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardray.parallel.kernels import vector
from shardray.parallel.kernels.vector import FLOAT, FLOATS, HALVES, I64, VECTOR_BYTES, WIDTH, WORDS

TILES = 2  # of keys in a block
_LOWEST = -126.0  # of an exponent of two
# 2 ** f for |f| <= 1/2, within 3e-6 for weights of 16 bits, and within 1e-8
_POWERS, _MORE_POWERS = ([math.log(2.0) ** k / math.factorial(k) for k in range(count)] for count in (6, 8))


def _floats(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * WIDTH)


def _words(value: int) -> Any:
    return ir.Constant(WORDS, [value] * WIDTH)


def _higher(builder: Any, a: Any, b: Any) -> Any:
    """One instruction, where neither is NaN"""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _exp2(builder: Any, x: Any, powers: list[float]) -> Any:
    """2 ** x for 16 floats <= 127; lower ones than -126 count as -126. Of 0 it is 1."""
    x = _higher(builder, x, _floats(_LOWEST))
    whole = vector.call(builder, "llvm.rint.v16f32", [x], FLOATS)
    f = builder.fsub(x, whole)
    power = _floats(powers[-1])
    for factor in reversed(powers[:-1]):
        power = vector.multiply_add(builder, power, f, _floats(factor))
    exponent = builder.shl(builder.fptosi(whole, WORDS), _words(23))
    return builder.bitcast(builder.add(builder.bitcast(power, WORDS), exponent), FLOATS)


def _to_bfloat16(builder: Any, values: Any) -> Any:
    """Sixteen floats to nearest; where two are as near, to the greater"""
    words = builder.add(builder.bitcast(values, WORDS), _words(0x8000))
    return builder.trunc(builder.lshr(words, _words(16)), HALVES)


@intrinsic
def interleave(typing_context: Any, first: Any, second: Any, target: Any) -> Any:
    """Sixteen words of two bfloat16: one from ``first`` and one from ``second``"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        first, second, target = operands
        low, high = (builder.zext(vector.load(builder, place, HALVES), WORDS) for place in (first, second))
        vector.store(builder, builder.or_(low, builder.shl(high, _words(16))), target)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def fill(typing_context: Any, target: Any, num_vectors: Any) -> Any:
    """Zeros"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        target, num_vectors = operands
        with vector.loop(builder, num_vectors) as i:
            vector.store(builder, _floats(0.0), vector.offset(builder, target, i, VECTOR_BYTES))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def shrink(typing_context: Any, sums: Any, num_vectors: Any, factor: Any) -> Any:
    """sums *= factor"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        sums, num_vectors, factor = operands
        factors = vector.splat(builder, factor)
        with vector.loop(builder, num_vectors) as i:
            place = vector.offset(builder, sums, i, VECTOR_BYTES)
            vector.store(builder, builder.fmul(vector.load_float32(builder, place), factors), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


def make_top(tile_vectors: int, num_tiles: int, all_visible: bool) -> Any:
    """A numba function (scores, tile bytes, visible) -> float32: the highest score of one row of a block of keys.

    Each tile holds 16 * tile_vectors of its scores, float32, ``tile bytes`` behind those of the tile before; the first
    ``visible`` count, or all of them if they are known to be ``all_visible``.
    """

    @intrinsic
    def top(typing_context: Any, scores: Any, tile_bytes: Any, visible: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            rows = [
                row if all_visible else builder.select(seen, row, _floats(-math.inf))
                for row, seen in _scores(builder, tile_vectors, num_tiles, *operands)
            ]
            highest = _tree(rows, functools.partial(_higher, builder))
            return vector.call(builder, "llvm.vector.reduce.fmax.v16f32", [highest], FLOAT)

        return types.float32(*[types.int64] * 3), generate

    return top


def make_soften(tile_vectors: int, num_tiles: int, all_visible: bool, in_bfloat16: bool = True) -> Any:
    """A numba function (scores, tile bytes, visible, scale, top, kept, weights) -> float32, for such a row.

    ``top`` is its highest score, and ``scale`` makes exponents of two of scores. Tops are looked for some rows ahead:
    what waits for its own row's is then computed for several rows at a time. Weights, 2 ** (scores * scale - highest),
    are written side by side, as bfloat16 or float32. ``kept`` is the address of two float32, the highest exponent and
    the sum of weights so far, and they become those of all scores until now. What is returned is the factor by which
    earlier sums shrink.

    Products and sums are joined as written here: what the compiler may join, it joins differently in each kernel.
    """
    weight_bytes = 2 if in_bfloat16 else 4
    exp2 = functools.partial(_exp2, powers=_POWERS if in_bfloat16 else _MORE_POWERS)

    @intrinsic
    def soften(
        typing_context: Any, scores: Any, tile_bytes: Any, visible: Any, scale: Any, top: Any, kept: Any, weights: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            scores, tile_bytes, visible, scale, top, kept, weights = operands
            factors, before = vector.splat(builder, scale), vector.load(builder, kept, FLOAT)
            highest = _higher(builder, builder.fmul(top, scale), before)
            tops, powers = vector.splat(builder, highest), []
            lowered = builder.fneg(tops)
            for v, (row, seen) in enumerate(_scores(builder, tile_vectors, num_tiles, scores, tile_bytes, visible)):
                power = exp2(builder, vector.multiply_add(builder, row, factors, lowered))
                power = power if all_visible else builder.select(seen, power, _floats(0.0))
                place = builder.add(weights, I64(v * WIDTH * weight_bytes))
                vector.store(builder, _to_bfloat16(builder, power) if in_bfloat16 else power, place)
                powers.append(power)
            total = _sum_lanes(builder, _tree(powers, builder.fadd))
            shrunk = exp2(builder, builder.fsub(vector.splat(builder, before), tops))
            factor = builder.extract_element(shrunk, vector.I32(0))
            place = builder.add(kept, I64(4))
            earlier = builder.fmul(vector.load(builder, place, FLOAT), factor)
            vector.store(builder, builder.fadd(earlier, total), place)
            vector.store(builder, highest, kept)
            return factor

        i64, f32 = types.int64, types.float32
        return f32(i64, i64, i64, f32, f32, i64, i64), generate

    return soften


def _scores(
    builder: Any, tile_vectors: int, num_tiles: int, scores: Any, tile_bytes: Any, visible: Any
) -> Iterator[tuple[Any, Any]]:
    """Sixteen scores of a row at a time, and which of them count"""
    count = vector.splat(builder, builder.trunc(visible, vector.I32))
    for v in range(tile_vectors * num_tiles):
        tile = vector.offset(builder, scores, tile_bytes, v // tile_vectors)
        lanes = ir.Constant(WORDS, list(range(v * WIDTH, (v + 1) * WIDTH)))
        row = vector.load_float32(builder, builder.add(tile, I64(v % tile_vectors * VECTOR_BYTES)))
        yield row, builder.icmp_signed("<", lanes, count)


def _tree(parts: list[Any], join: Any) -> Any:
    while len(parts) > 1:
        parts = [join(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def _sum_lanes(builder: Any, lanes: Any) -> Any:
    """The sum of 16 floats, in a fixed order"""
    for half in (8, 4, 2, 1):
        order = ir.Constant(WORDS, [(i + half) % WIDTH for i in range(WIDTH)])
        lanes = builder.fadd(lanes, builder.shuffle_vector(lanes, lanes, order))
    return builder.extract_element(lanes, vector.I32(0))
