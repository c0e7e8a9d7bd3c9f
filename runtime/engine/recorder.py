"""Records what runs on the device, so that it can run again at once: a CUDA graph, or the same calls once more.

Whoever runs a recording again puts its inputs where those of the recorded run lay, and reads what came of it before any
recording of the same recorder runs again: they share their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T", bound=tuple[Tensor | None, ...])
_WARM_UP_RUNS = 2  # kernels are compiled, workspaces and communicators made: none of that may happen in a capture


class Recorder(Protocol):
    def record(self, run: Callable[[], T]) -> Callable[[], T]:
        """``run`` does the same on the same memory whenever it is called. What is returned does it again."""


class EagerRecorder:
    """Runs the same calls again: right on every device, faster on none. What graphs stand on is tested with it."""

    def record(self, run: Callable[[], T]) -> Callable[[], T]:
        run()
        return run


class GraphRecorder:
    """CUDA graphs that share a pool of memory. The largest should be recorded first: the others then fit into it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], T]) -> Callable[[], T]:
        """Raises RuntimeError if something in ``run`` cannot be captured."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                run()
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are looked at: NCCL's watchdog, and threads that serve, may go on.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs: Any = run()
        borrowed = [None if output is None else _borrowed(output) for output in outputs]
        # Of the type that ``run`` gives: a tuple with or without names.
        found: Any = outputs._make(borrowed) if hasattr(outputs, "_make") else tuple(borrowed)

        def replay() -> Any:
            graph.replay()
            return found

        return replay


def choose_recorder(device: torch.device) -> Recorder:
    return GraphRecorder(device) if device.type == "cuda" else EagerRecorder()


class _Borrowed:
    """Memory of a pool, described as numba does (its ``__cuda_array_interface__``, version 3)."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _borrowed(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, without a share in it: it goes back to the pool, for the next recording.

    A batch of logits for each of a dozen recordings would take half a gigabyte.
    """
    memory = torch.as_tensor(_Borrowed(tensor), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)


def find_obstacle(run: Callable[[], object]) -> str | None:
    """What in ``run`` a graph cannot hold, as the name of an operation; None if nothing is seen.

    Such operations need the host to look at what the device has computed, or the device to read the host's memory.
    """
    with _Watch() as watch:
        run()
    return watch.found[0] if watch.found else None


_LOOKS_AT_RESULTS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler with the first call, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _needs_host(func, args, result):
            self.found.append(str(func))
        return result


def _needs_host(func: Any, args: Sequence[Any], result: Any) -> bool:
    if func.overloadpacket in _INDEXING:  # by a mask: as many elements as it has ones
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    if func.overloadpacket in _COPIES:
        return len({value.device.type for value in (*args[:2], result) if isinstance(value, Tensor)}) > 1
    if func is torch.ops.aten.lift_fresh.default:  # how torch.tensor([...], device="cuda") looks from here
        return bool(result.device.type != "cpu")
    return any(tag in func.tags for tag in _LOOKS_AT_RESULTS)
