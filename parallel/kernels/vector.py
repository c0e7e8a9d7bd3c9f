"""Sixteen floats at a time: what kernels emit in LLVM themselves, for the loops that its vectorizer does not get right.

LLVM lowers a vector of 16 floats to whatever the processor has (one AVX-512 register, two of AVX, four of NEON), so the
same kernels run everywhere. Addresses are int64, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDTH = 16
VECTOR_BYTES = 4 * WIDTH  # of 16 floats or words
I32, I64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, WORDS, HALVES = (ir.VectorType(kind, WIDTH) for kind in (FLOAT, I32, ir.IntType(16)))


def call(builder: Any, name: str, operands: list[Any], result: Any) -> Any:
    """Call one of LLVM's intrinsics."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
    return builder.call(function, operands)


def load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)


def load_bfloat16(builder: Any, address: Any) -> Any:
    """Sixteen bfloat16, widened"""
    words = builder.zext(load(builder, address, HALVES), WORDS)
    return builder.bitcast(builder.shl(words, ir.Constant(WORDS, [16] * WIDTH)), FLOATS)


def load_float32(builder: Any, address: Any) -> Any:
    return load(builder, address, FLOATS)


def to_bfloat16(builder: Any, values: Any) -> Any:
    """Sixteen floats, rounded to nearest, ties to even"""
    upper, one, below_half = (ir.Constant(WORDS, [value] * WIDTH) for value in (16, 1, 0x7FFF))
    bits = builder.bitcast(values, WORDS)
    odd = builder.and_(builder.lshr(bits, upper), one)
    return builder.trunc(builder.lshr(builder.add(builder.add(bits, below_half), odd), upper), HALVES)


def splat(builder: Any, value: Any) -> Any:
    """A vector of one float or word"""
    kind = ir.VectorType(value.type, WIDTH)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(WORDS, [0] * WIDTH))


def multiply_add(builder: Any, factor: Any, values: Any, total: Any) -> Any:
    """factor * values + total, rounded once"""
    return call(builder, "llvm.fma.v16f32", [factor, values, total], FLOATS)


def prefetch(builder: Any, address: Any) -> None:
    """Fetch a cache line into the second-level cache. Any address will do."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    read, second_level, data = I32(0), I32(2), I32(1)
    call(builder, "llvm.prefetch.p0", [pointer, read, second_level, data], ir.VoidType())


def prefetch_lines(builder: Any, address: Any, index: Any, num_bytes: Any) -> None:
    """Fetch what lies at address + index * num_bytes: 0, 64 or 128 bytes"""
    line = builder.add(address, builder.mul(index, num_bytes))
    prefetch(builder, line)
    prefetch(builder, builder.add(line, builder.lshr(num_bytes, I64(1))))  # another if there are two


def register(builder: Any, value: Any) -> Any:
    """A variable that LLVM keeps in a register: ``builder.load`` and ``builder.store``"""
    return cgutils.alloca_once_value(builder, value)  # type: ignore[no-untyped-call]


def offset(builder: Any, address: Any, index: Any, num_bytes: int) -> Any:
    """address + index * num_bytes"""
    return builder.add(address, builder.mul(index, I64(num_bytes)))


@contextmanager
def loop(builder: Any, count: Any) -> Iterator[Any]:
    """Emits what follows once for each index below ``count``."""
    with cgutils.for_range(builder, count) as places:
        yield places.index


def choose(builder: Any, key: Any, keys: Iterable[int], emit: Callable[[int], None]) -> None:
    """Emits code for each of ``keys``, and the choice by ``key``, which must be one of them."""
    done, other = builder.append_basic_block("done"), builder.append_basic_block("other")
    choice = builder.switch(key, other)
    for each in keys:
        case = builder.append_basic_block(f"case_{each}")
        choice.add_case(I64(each), case)
        with builder.goto_block(case):
            emit(each)
            builder.branch(done)
    builder.position_at_end(other)
    builder.unreachable()
    builder.position_at_end(done)


@intrinsic
def copy(typing_context: Any, source: Any, num_vectors: Any, target: Any) -> Any:
    """Vectors of float32, from one address to another"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        source, num_vectors, target = operands
        with loop(builder, num_vectors) as i:
            value = load_float32(builder, offset(builder, source, i, VECTOR_BYTES))
            store(builder, value, offset(builder, target, i, VECTOR_BYTES))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def clear(typing_context: Any, target: Any, num_vectors: Any) -> Any:
    """Vectors of zeros, from an address on"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        target, num_vectors = operands
        with loop(builder, num_vectors) as i:
            store(builder, ir.Constant(WORDS, [0] * WIDTH), offset(builder, target, i, VECTOR_BYTES))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def narrow(typing_context: Any, source: Any, num_vectors: Any, target: Any) -> Any:
    """Vectors of float32 to bfloat16, rounded to nearest, ties to even"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        source, num_vectors, target = operands
        with loop(builder, num_vectors) as i:
            value = load_float32(builder, offset(builder, source, i, VECTOR_BYTES))
            store(builder, to_bfloat16(builder, value), offset(builder, target, i, VECTOR_BYTES // 2))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def address_of(typing_context: Any, array: Any) -> Any:
    """Where the first element of a contiguous array lies."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        data = context.make_array(array)(context, builder, operands[0]).data
        return builder.ptrtoint(data, I64)

    return types.int64(array), generate


@intrinsic
def copy_bytes(typing_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """memcpy between two addresses"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        target, source = (builder.inttoptr(operand, cgutils.voidptr_t) for operand in operands[:2])
        cgutils.raw_memcpy(builder, target, source, operands[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
