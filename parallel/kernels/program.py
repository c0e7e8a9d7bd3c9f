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
from shardray.parallel.kernels.chain import MARK_WORDS, compile_chain
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
        self._starts = np.cumsum([0, *(len(block) for block in blocks)])[:-1]
        self._blocks = np.concatenate(blocks)
        self._marks = np.zeros((len(launches), MARK_WORDS), np.int64)
        self._launches = np.array(
            [
                (launch.function.address, self._blocks[start:].ctypes.data, launch.num_threads, launch.wait is not None)
                for launch, start in zip(launches, self._starts, strict=True)
            ],
            dtype=np.int64,
        )
        addresses = [self._launches.ctypes.data, self._marks.ctypes.data]
        num_threads = max(launch.num_threads for launch in launches)
        self._args = np.array([num_threads, 0, 0, *addresses, 0], dtype=np.int64)
        self._address = self._args.ctypes.data
        self._run = jit.on_threads(compile_chain(), num_threads)
        self._waits = [launch.wait for launch in launches]
        self._names = [launch.name for launch in launches]
        self._kept = [kept, launches]
        self._reopen(0, len(launches))

    def run(self) -> None:
        """Launch everything once more. Raises what a wait raises; the program cannot be used after that."""
        self._run_between(0, len(self._waits))

    def run_timed(self, spans: Spans) -> None:
        """As ``run``, with each launch that may have to wait for other ranks written down."""
        done = 0
        for at, wait in enumerate(self._waits):
            if wait is not None:
                self._run_between(done, at)
                begin_ns, done = time.monotonic_ns(), at + 1
                self._run_between(at, done)
                spans.note(SpanKind.COLLECTIVE, self._names[at], begin_ns)
        self._run_between(done, len(self._waits))

    def _run_between(self, first: int, end: int) -> None:
        while first < end:
            self._args[1:3] = first, end
            self._args[5] = end
            self._run(self._address)
            reached = int(self._args[5])
            self._reopen(first, reached)
            if reached < end:
                wait = self._waits[reached]
                assert wait is not None
                wait(int(self._blocks[self._starts[reached]]))
                self._marks[reached] = 0
            first = reached

    def _reopen(self, first: int, end: int) -> None:
        """For the next run."""
        self._marks[first:end] = 0
        self._blocks[self._starts[first:end]] = BEGUN  # or a task counter of 0


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
