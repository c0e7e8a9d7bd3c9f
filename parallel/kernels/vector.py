"""Sixteen floats at a time: a numba value type over LLVM vectors, for the loops that its vectorizer does not get right.

LLVM lowers a vector of 16 floats to whatever the processor has (one AVX-512 register, two of AVX, four of NEON), so the
same kernels run everywhere. Offsets count elements.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 16
_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)
_F32: Any = types.CPointer(types.float32)  # type: ignore[no-untyped-call]
_U32: Any = types.CPointer(types.uint32)  # type: ignore[no-untyped-call]
_U16: Any = types.CPointer(types.uint16)  # type: ignore[no-untyped-call]


class _Floats(types.Type):
    """The numba type of a vector value; lives in registers."""

    def __init__(self) -> None:
        super().__init__(name="floats16")


floats: Any = _Floats()


@register_model(_Floats)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)  # type: ignore[no-untyped-call]


def _at(builder: Any, pointer: Any, offset: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())


@intrinsic
def zeros(typing_context: Any) -> Any:
    """Sixteen zeros."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return ir.Constant(_FLOATS, [0.0] * WIDTH)

    return floats(), generate


@intrinsic
def load_float32(typing_context: Any, pointer: Any, offset: Any) -> Any:
    """Sixteen float32 from ``pointer`` (of floats, or of their bits) on."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.load(_at(builder, operands[0], operands[1], _FLOATS), align=4)

    return floats(_U32 if pointer == _U32 else _F32, types.int64), generate


@intrinsic
def load_bfloat16(typing_context: Any, pointer: Any, offset: Any) -> Any:
    """Sixteen bfloat16 from ``pointer`` on, widened."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        words = builder.zext(builder.load(_at(builder, operands[0], operands[1], _HALVES), align=2), _INTS)
        return builder.bitcast(builder.shl(words, ir.Constant(_INTS, [16] * WIDTH)), _FLOATS)

    return floats(_U16, types.int64), generate


@intrinsic
def store(typing_context: Any, pointer: Any, offset: Any, value: Any) -> Any:
    """Sixteen float32 to ``pointer`` on."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        builder.store(operands[2], _at(builder, operands[0], operands[1], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(_F32, types.int64, floats), generate


@intrinsic
def multiply_add(typing_context: Any, scalar: Any, values: Any, total: Any) -> Any:
    """scalar * values + total"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        scalar, values, total = operands
        first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.IntType(32)(0))
        spread = builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * WIDTH))
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        name = f"llvm.fma.v{WIDTH}f32"
        fma = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(fma, [spread, values, total])

    return floats(types.float32, floats, floats), generate


@intrinsic
def add(typing_context: Any, left: Any, right: Any) -> Any:
    """left + right"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.fadd(*operands)

    return floats(floats, floats), generate


@intrinsic
def address_of(typing_context: Any, array: Any) -> Any:
    """A float32 pointer to the first element of a contiguous array."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        data = context.make_array(array)(context, builder, operands[0]).data
        return builder.bitcast(data, _FLOAT.as_pointer())

    return _F32(array), generate
