"""What threads and ranks that share memory tell each other by, for compiled kernels."""

# mypy: ignore-errors
# (numba's dialect)

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shardray.parallel.kernels.vector import I64


@intrinsic
def load_acquire(typing_context, address):
    """The int64 at ``address``; what its writer wrote before it is seen by every read that follows."""

    def generate(context, builder, signature, operands):
        pointer = builder.inttoptr(operands[0], I64.as_pointer())
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typing_context, address, value):
    """Write an int64 after everything that was read and written before."""

    def generate(context, builder, signature, operands):
        pointer = builder.inttoptr(operands[0], I64.as_pointer())
        builder.store_atomic(operands[1], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add(typing_context, address, amount):
    """Add to the int64 at ``address``; returns the old value. A fence in both directions."""

    def generate(context, builder, signature, operands):
        pointer = builder.inttoptr(operands[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, operands[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def pause(typing_context):
    """Tell the processor that this is a spin loop."""

    def generate(context, builder, signature, operands):
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_up_core(typing_context):
    """sched_yield"""

    def generate(context, builder, signature, operands):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def cycles(typing_context):
    """The processor's clock, which runs at about the same rate whatever the processor does."""

    def generate(context, builder, signature, operands):
        kind = ir.FunctionType(I64, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate
