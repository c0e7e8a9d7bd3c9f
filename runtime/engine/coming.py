"""A result to come: a step that has been launched, of which the host has not seen the tokens yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardray.runtime.engine.step import StepResult


class HostCopy:
    """Tensors on their way to the host. On a CPU they are there at once."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.tensors = list(tensors)
        self.is_there = device.type == "cpu"
        if not self.is_there:
            # torch keeps track of pinned memory: it is not handed out again before the copy into it is done.
            self.tensors = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            for target, tensor in zip(self.tensors, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def ready(self) -> bool:
        """Whether the device has done the step, and what came before it. Raises RuntimeError if it has failed."""
        return self.is_there or bool(self._done.query())  # type: ignore[no-untyped-call]


class ComingResult:
    """Of one step on one rank. To be fetched once, in the order of the steps.

    What is there at once is read at once: whoever fetches it later would compete with the next step for a core.
    """

    def __init__(
        self, copy: HostCopy, read: Callable[[Sequence[Tensor]], StepResult | None],
        wait: Callable[[Callable[[], bool]], None],
    ) -> None:  # fmt: skip
        """``read`` says what the tensors mean, ``wait`` returns once something holds."""
        self._copy = copy
        self._read = read
        self._wait = wait
        self._result = read(copy.tensors) if copy.is_there else None

    @property
    def is_there(self) -> bool:
        """Whether ``fetch`` has nothing to wait for."""
        return self._copy.is_there

    def fetch(self) -> StepResult | None:
        """The step's result on the rank that samples, None on the others. Raises MeshError, in time."""
        if self._copy.is_there:
            return self._result
        self._wait(self._copy.ready)
        return self._read(self._copy.tensors)
