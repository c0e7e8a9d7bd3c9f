"""The compiled part of a program (see parallel/kernels/program.py): one launch after the other."""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars)

from __future__ import annotations

import functools

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardray.parallel.exchange import BEGUN, DONE
from shardray.parallel.kernels import jit
from shardray.parallel.kernels.jit import Function
from shardray.parallel.kernels.vector import I64


@intrinsic
def _call(typing_context, function, block):
    """function(block), both addresses"""

    def generate(context, builder, signature, operands):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(operands[0], kind.as_pointer()), [operands[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _call_team(typing_context, team, function, block, num_threads):
    """GOMP_parallel(function, block, num_threads, 0)"""

    def generate(context, builder, signature, operands):
        team, function, block, num_threads = operands
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, ir.IntType(32), ir.IntType(32)])
        count = builder.trunc(num_threads, ir.IntType(32))
        builder.call(builder.inttoptr(team, kind.as_pointer()), [function, block, count, ir.IntType(32)(0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _run_steps(args):
    """args: unused, step to start with, number of steps, steps, GOMP_parallel or 0

    Steps are (function, block, threads, whether it may have to wait). Ends at the first that has to; its block says how
    far it came, and it goes on from there when it is called again.
    """
    a = numba.carray(args, (5,))
    steps, team = numba.carray(jit.pointer_i64(a[3]), (a[2], 4)), a[4]
    for i in range(a[1], a[2]):
        block = jit.pointer_i64(steps[i, 1])
        if steps[i, 2] > 1 and team != 0:
            _call_team(team, steps[i, 0], steps[i, 1], steps[i, 2])
        else:
            _call(steps[i, 0], steps[i, 1])
        if steps[i, 3] != 0 and block[0] != DONE:
            a[1] = i
            return
        block[0] = BEGUN
    a[1] = a[2]


@functools.cache
def compile_chain() -> Function:
    return jit.compile_function(_run_steps)
