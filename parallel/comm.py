"""Collectives over one group of ranks: the only home of a sum across ranks.

A group is an object that is passed in; nothing here knows of a world. Sums run over float32 in rank order, so every
rank holds the same bits. Three implementations behind one interface: ``SoloComm`` (a group of one, no-ops),
``ShmComm`` (shared memory, ranks on one machine's CPUs; parallel/shm.py), ``TorchComm`` (gloo between machines, NCCL between GPUs).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardray.parallel.errors import CollectiveTimeout, MeshError, PeerLost


class Comm(Protocol):
    """The operations that a decoder needs. Each has a deadline and raises MeshError when it cannot be met."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of ``x`` (any shape, same on all ranks); may reuse ``x``."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        """Concatenate (rows, widths[rank]) blocks along the last dimension on rank 0; None elsewhere."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``, written into ``x`` on the others."""

    def close(self) -> None:
        """Leave the group. Never blocks on other ranks."""


class SoloComm:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def close(self) -> None:
        return None


class TorchComm:
    """A group over a process group of torch.distributed (gloo or NCCL) that belongs to this object alone."""

    def __init__(self, group: Any, rank: int, size: int, timeout_s: float, name: str) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._timeout_s = timeout_s
        self._name = name

    def all_reduce(self, x: Tensor) -> Tensor:
        self._wait("all_reduce", lambda: self._group.allreduce([x]))
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        padded = torch.nn.functional.pad(x, (0, max(widths) - widths[self.rank])).contiguous()
        blocks = [torch.empty_like(padded) for _ in widths]
        self._wait("gather", lambda: self._group.allgather([blocks], [padded]))
        if self.rank != 0:
            return None
        return torch.cat([block[..., :width] for block, width in zip(blocks, widths, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        self._wait("broadcast", lambda: self._group.broadcast([x], _broadcast_options()))
        return x

    def start_send(self, x: Tensor, to_rank: int) -> Any:
        """Begin sending ``x``, which must live until ``finish`` has taken the returned work."""
        return self._start(f"send to stage {to_rank}", lambda: self._group.send([x], to_rank, 0))

    def recv(self, x: Tensor, from_rank: int) -> Tensor:
        self._wait(f"receive from stage {from_rank}", lambda: self._group.recv([x], from_rank, 0))
        return x

    def finish(self, operation: str, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._explain(operation, error) from error

    def close(self) -> None:
        self._group = None

    def _wait(self, operation: str, start: Callable[[], Any]) -> None:
        self.finish(operation, self._start(operation, start))

    def _start(self, operation: str, start: Callable[[], Any]) -> Any:
        try:
            return start()
        except RuntimeError as error:
            raise self._explain(operation, error) from error

    def _explain(self, operation: str, error: RuntimeError) -> MeshError:
        what = f"{self._name} {operation}"
        if "imed out" in str(error):
            return CollectiveTimeout(what, self._timeout_s)
        return PeerLost(what, str(error).splitlines()[0])


def open_torch_comm(
    store: dist.Store, rank: int, size: int, device: torch.device, bind_host: str, timeout_s: float, name: str
) -> TorchComm:
    """A process group of its own for one group of ranks: NCCL on CUDA, gloo (TCP on ``bind_host``) on CPU."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        group: Any = dist.ProcessGroupNCCL(store, rank, size, nccl)
    else:
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_host)]
        gloo._timeout = timeout
        group = dist.ProcessGroupGloo(store, rank, size, gloo)  # type: ignore[call-overload]
    return TorchComm(group, rank, size, timeout_s, name)


def _broadcast_options() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options
