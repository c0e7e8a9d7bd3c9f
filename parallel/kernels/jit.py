"""How compiled CPU kernels are built and started: numba functions over raw addresses, run on torch's OpenMP threads.

A kernel is ``void kernel(int64 *args)``. args[0] is the shared task counter; the rest are addresses and sizes. Every
thread takes tasks off the counter until none is left, so uneven tasks balance. Starting one costs a few microseconds
and no interpreter lock is held meanwhile. Nothing is compiled ahead: machine code is cached beside this file (or in
NUMBA_CACHE_DIR) after the first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, cast

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

_ARGS: Any = types.CPointer(types.int64)  # type: ignore[no-untyped-call]
_SIGNATURE = types.void(_ARGS)
# Sums may be reordered and products fused, for vector code; NaN and infinity keep their meaning.
MATH = {"reassoc", "contract", "nsz", "arcp"}

Kernel = Callable[..., None]


class Element(NamedTuple):
    """How a kernel reads and writes tensors of one dtype; it computes in float32."""

    name: str
    pointer: Any  # address -> typed pointer
    load: Any  # (source, start, count, words)
    store: Any  # (words, count, target, start)


@intrinsic
def take_task(typing_context: Any, args: Any) -> Any:
    """Atomically ``args[0]++``; returns the old value. Ordered, so that whoever finds no task left knows of all takers.

    See ``chain.py``.
    """

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", operands[0], one, "acq_rel")

    return types.int64(_ARGS), generate


def _pointer_intrinsic(element: Any) -> Any:
    pointer_type: Any = types.CPointer(element)  # type: ignore[no-untyped-call]

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            kind = context.get_value_type(pointer_type)
            return builder.inttoptr(operands[0], kind)

        return pointer_type(types.int64), generate

    return pointer


pointer_u16 = _pointer_intrinsic(types.uint16)
pointer_u32 = _pointer_intrinsic(types.uint32)
pointer_f32 = _pointer_intrinsic(types.float32)
pointer_f64 = _pointer_intrinsic(types.float64)
pointer_i32 = _pointer_intrinsic(types.int32)
pointer_i64 = _pointer_intrinsic(types.int64)


class Function:
    """Machine code of ``void function(int64 *args)``, and what owns it."""

    def __init__(self, compiled: Any) -> None:
        self.address: int = compiled.address
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)
        self._compiled = compiled


class Launch(NamedTuple):
    """One run of a function, as it is recorded. ``wait`` is of those that may return before they are done, and ``name``
    what a trace calls them."""

    function: Function
    block: bytes  # its arguments
    num_threads: int = 1
    wait: Callable[[int], None] | None = None
    name: str = ""


_recording = threading.local()


@contextmanager
def recorded(launches: list[Launch]) -> Iterator[None]:
    """Note what the calling thread launches meanwhile."""
    _recording.launches = launches
    try:
        yield
    finally:
        del _recording.launches


def record(launch: Launch) -> None:
    """Note a launch if somebody records."""
    if (launches := getattr(_recording, "launches", None)) is not None:
        launches.append(launch)


def compile_function(function: Callable[..., None], names: dict[str, Any] | None = None, variant: str = "") -> Function:
    """``function`` over the address of its arguments; its machine code is cached on disk.

    ``names`` stand for its globals, and ``variant`` tells such functions apart. numba's cache sees a change in the file
    of a function, but none in what it uses of others; so all sources enter its name.
    """
    digest = _digest_of(Path(function.__code__.co_filename).parent)
    own = FunctionType(function.__code__, names or function.__globals__, f"{function.__name__}{variant}_{digest}")
    own.__qualname__ = own.__name__
    own.__module__ = function.__module__
    return Function(numba.cfunc(_SIGNATURE, cache=True, fastmath=MATH, error_model="numpy")(own))


@functools.cache
def _digest_of(folder: Path) -> str:
    """Of the sources beside this file and in ``folder``: of all that a kernel there is made of"""
    sources = sorted({*Path(__file__).parent.glob("*.py"), *folder.glob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


class _Plain(NamedTuple):
    """Of a kernel that there is only one of."""

    name: str = "plain"


_PLAIN = _Plain()


def compile_kernel(function: Callable[..., None], variant: Element | Any = _PLAIN) -> Kernel:
    """A Python callable that runs ``function`` over (num_threads, *args).

    ``variant`` is a named tuple with a name. In the function's body global names that are fields of it (an element's
    ``pointer``, ``load`` and ``store``) become its values: a function of its own name and globals, since a closure
    would not be found in the cache again.
    """
    compiled = compile_function(function, {**function.__globals__, **variant._asdict()}, f"_{variant.name}")
    team = openmp_team()

    def run(num_threads: int, *args: int) -> None:
        block = _format(len(args))(0, *args)  # of this call alone, so the counter in it can be counted up in place
        record(Launch(compiled, block, num_threads))
        if num_threads > 1 and team is not None:
            team(compiled.address, block, num_threads, 0)
        else:
            compiled.call(block)

    return run


def on_threads(function: Function, num_threads: int) -> Callable[[int], None]:
    """What calls ``function`` with an address on that many threads at once, or on one if there is no OpenMP."""
    team = openmp_team()
    if num_threads == 1 or team is None:
        return cast(Callable[[int], None], function.call)
    return lambda address: team(function.address, address, num_threads, 0)


@functools.cache
def _format(num_args: int) -> Callable[..., bytes]:
    """Packs the counter and the arguments: a fifth of the time that a ctypes array takes."""
    return struct.Struct(f"{num_args + 1}q").pack


@functools.cache
def openmp_team() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch computes with: the same threads, so no two pools compete."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    for path in sorted(paths, key=lambda path: "torch" not in path):
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            try:
                team = ctypes.CDLL(path).GOMP_parallel
            except (OSError, AttributeError):
                continue
            team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            team.restype = None
            return team
    return None


@numba.njit(inline="always", fastmath=MATH)
def widen(source: Any, start: int, count: int, words: Any) -> None:
    """bfloat16 source[start : start + count] into the upper halves of ``words`` (uint32, seen as float32)."""
    for i in range(count):
        words[i] = np.uint32(source[start + i]) << np.uint32(16)


@numba.njit(inline="always", fastmath=MATH)
def narrow(words: Any, count: int, target: Any, start: int) -> None:
    """float32 bits in ``words`` into bfloat16 target[start : start + count], to nearest, ties to even."""
    for i in range(count):
        bits = words[i]
        target[start + i] = np.uint16(
            (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        )


@numba.njit(inline="always", fastmath=MATH)
def copy_in(source: Any, start: int, count: int, words: Any) -> None:
    """float32 bits source[start : start + count] into ``words``."""
    for i in range(count):
        words[i] = source[start + i]


@numba.njit(inline="always", fastmath=MATH)
def copy_out(words: Any, count: int, target: Any, start: int) -> None:
    """float32 bits in ``words`` into target[start : start + count]."""
    for i in range(count):
        target[start + i] = words[i]


BFLOAT16 = Element("bfloat16", pointer_u16, widen, narrow)
FLOAT32 = Element("float32", pointer_u32, copy_in, copy_out)


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float32 of those bits"""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.bitcast(operands[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@numba.njit(inline="always", fastmath=MATH)
def exp(value: Any) -> Any:
    """e ** value for float32 <= 88, within 2e-7 relative; lower ones than -87 count as -87.

    2 ** (n + f) with |f| <= 1/2: the power of two by exponent bits, the rest by its Taylor series to the 7th order.
    """
    value = max(value, np.float32(-87.0))
    whole = np.rint(value * np.float32(1.4426950408889634))
    f = value - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)  # ln 2 in two parts
    p = np.float32(1.0 / 5040.0)
    p = p * f + np.float32(1.0 / 720.0)
    p = p * f + np.float32(1.0 / 120.0)
    p = p * f + np.float32(1.0 / 24.0)
    p = p * f + np.float32(1.0 / 6.0)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * float_of(exponent)  # type: ignore[call-arg]
