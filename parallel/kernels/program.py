"""Kernel launches recorded once and run again without the interpreter between them, as a CUDA graph does on a GPU.

What is recorded are machine code and addresses. So whoever runs a program again puts its inputs where those of the
recorded run lay, finds the outputs where they lay, and keeps what the addresses point to alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardray.parallel.exchange import BEGUN
from shardray.parallel.kernels import jit
from shardray.parallel.kernels.chain import compile_chain
from shardray.parallel.kernels.jit import Launch
from shardray.parallel.spans import SpanKind, Spans

Result = TypeVar("Result")

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps new tensors, and sees whether torch computes anything itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []
        self.computed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler with the first call, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY or func.is_view:
            self.kept.append(result)
        else:
            self.computed = True
        return result


class Program:
    """A list of launches. ``kept`` is what else has to live as long."""

    def __init__(self, launches: Sequence[Launch], kept: object) -> None:
        blocks = [np.frombuffer(launch.block, np.int64) for launch in launches]
        starts = np.cumsum([0, *(len(block) for block in blocks)])[:-1]
        self._blocks = np.concatenate(blocks)
        self._blocks[starts] = BEGUN  # or a task counter of 0
        self._starts = starts
        self._steps = np.array(
            [
                (launch.function.address, self._blocks[start:].ctypes.data, launch.num_threads, launch.wait is not None)
                for launch, start in zip(launches, starts, strict=True)
            ],
            dtype=np.int64,
        )
        self._state = np.array([0, 0, len(launches), self._steps.ctypes.data, jit.openmp_address()], dtype=np.int64)
        self._address = self._state.ctypes.data
        self._waits = [launch.wait for launch in launches]
        self._run = compile_chain().call
        self._kept = [kept, launches]

    def run(self) -> None:
        """Launch everything once more. Raises what a wait raises; the program cannot be used after that."""
        self._state[1] = 0
        self._run_to(len(self._waits))

    def run_timed(self, spans: Spans) -> None:
        """As ``run``, with each launch that may have to wait for other ranks written down."""
        self._state[1] = 0
        for at, wait in enumerate(self._waits):
            if wait is not None:
                self._run_to(at)
                begin_ns = time.monotonic_ns()
                self._run_to(at + 1)
                spans.note(SpanKind.COLLECTIVE, "all_reduce", begin_ns)
        self._run_to(len(self._waits))

    def _run_to(self, count: int) -> None:
        """From the launch at which the state stands."""
        state = self._state
        state[2] = count
        self._run(self._address)
        while (at := int(state[1])) < count:
            wait = self._waits[at]
            assert wait is not None
            wait(int(self._blocks[self._starts[at]]))
            self._run(self._address)


class Recorder:
    """Records programs that run one after the other, never at once: they may share the memory between."""

    def __init__(self) -> None:
        compile_chain()

    def record(self, run: Callable[[], Result]) -> tuple[Result, Program | None]:
        """What ``run`` returns, and the program that does it again: None if torch computed something in it."""
        launches: list[Launch] = []
        watch = _Watch()
        with jit.recorded(launches), watch:
            result = run()
        return result, None if watch.computed or not launches else Program(launches, watch.kept)
