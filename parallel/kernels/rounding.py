"""Rounding a group of 64 floats to 8 bits, in LLVM: the largest becomes 127 or -127."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardray.parallel.kernels import vector
from shardray.parallel.kernels.int8_tile import GROUP, START_AT, VALUES_AT
from shardray.parallel.kernels.vector import FLOAT, FLOATS, I32, I64, WIDTH, WORDS

_BYTES = ir.VectorType(ir.IntType(8), WIDTH)
_BOUND, _INFINITY = 127.0, 0x7F800000


def _make(load: Callable[[Any, Any], Any], item_bytes: int) -> Any:
    """A numba function over the addresses of a group of floats, and of where it goes as int8_tile.py reads it.

    Of a group that is not finite, the scale is not either, and the int8 are zeros.
    """

    @intrinsic
    def round_group(typing_context: Any, source: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            _emit(builder, load, item_bytes, *operands)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return round_group


def _emit(builder: Any, load: Callable[[Any, Any], Any], item_bytes: int, source: Any, target: Any) -> None:
    values = [load(builder, builder.add(source, I64(i * item_bytes))) for i in range(0, GROUP, WIDTH)]
    largest = _reduce(builder, "smax", [_magnitude(builder, value) for value in values])
    top = builder.bitcast(largest, FLOAT)
    above, below = builder.icmp_signed(">", largest, I32(0)), builder.icmp_signed("<", largest, I32(_INFINITY))
    fits, zeros = builder.and_(above, below), ir.Constant(FLOATS, [0.0] * WIDTH)
    factor = vector.splat(builder, builder.fdiv(FLOAT(_BOUND), top))
    rounded = []
    for i, value in enumerate(values):
        scaled = builder.select(fits, builder.fmul(value, factor), zeros)
        whole = vector.call(builder, "llvm.rint.v16f32", [scaled], FLOATS)
        rounded.append(builder.fptosi(whole, WORDS))
        vector.store(builder, builder.trunc(rounded[i], _BYTES), builder.add(target, I64(VALUES_AT + i * WIDTH)))
    total = _reduce(builder, "add", rounded)
    vector.store(builder, builder.fmul(top, FLOAT(1.0 / _BOUND)), target)
    vector.store(builder, builder.mul(total, I32(-128)), builder.add(target, I64(START_AT)))


def _magnitude(builder: Any, values: Any) -> Any:
    """Without their signs, as integers, which are in the order of the floats"""
    return builder.and_(builder.bitcast(values, WORDS), ir.Constant(WORDS, [0x7FFFFFFF] * WIDTH))


def _reduce(builder: Any, name: str, parts: list[Any]) -> Any:
    while len(parts) > 1:
        first, second, *rest = parts
        pair = [first, second]
        parts = [
            *rest,
            builder.add(*pair) if name == "add" else vector.call(builder, f"llvm.{name}.v16i32", pair, WORDS),
        ]
    return vector.call(builder, f"llvm.vector.reduce.{name}.v16i32", parts, I32)


round_bfloat16 = _make(vector.load_bfloat16, 2)
round_float32 = _make(vector.load_float32, 4)
