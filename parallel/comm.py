"""Collectives over one group of ranks: the only home of a sum across ranks.

A group is an object that is passed in; nothing here knows of a world. On CPUs a sum runs in float32 and in rank order,
so every rank holds the same bits, on one machine or on several. Implementations behind one interface:

    SoloComm     a group of one: no-ops
    ShmComm      ranks on one machine's CPUs: shared memory            parallel/shm.py
    GlooComm     ranks on the CPUs of several machines: gloo           parallel/gloo.py
    NcclComm     ranks on GPUs: NCCL
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from shardray.parallel.errors import CollectiveTimeout, MeshError, PeerLost

_WATCHDOG_FACTOR = 4  # times the deadline of a step


class Comm(Protocol):
    """The operations that a decoder needs. Each has a deadline and raises MeshError when it cannot be met."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of ``x`` (any shape, same on all ranks); may reuse ``x``."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x`` (any shape of a few KiB, same on all ranks), (size, ...)."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        """Concatenate (rows, widths[rank]) blocks along the last dimension on rank 0; None elsewhere."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``, written into ``x`` on the others."""

    def abort(self) -> None:
        """Make an operation that is blocked raise MeshAborted soon. The group is of no use afterwards. Thread-safe."""

    def close(self) -> None:
        """Leave the group. Never blocks on other ranks."""


class PairComm(Protocol):
    """Point-to-point messages of a group of two."""

    def start_send(self, x: Tensor) -> Any:
        """Begin sending ``x``, which may not change until ``finish_send`` has taken what this returns."""

    def finish_send(self, sending: Any) -> None: ...

    def recv(self, x: Tensor) -> Tensor:
        """The next message, written into ``x``."""

    def abort(self) -> None: ...

    def close(self) -> None: ...


def sum_in_rank_order(parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """The sum of one part a rank, in float32, rounded once into ``out`` (which may be one of the parts)."""
    if len(parts) == 2:  # one addition rounds like this anyway
        return torch.add(parts[0], parts[1], out=out)
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return out.copy_(total)


class SoloComm:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def abort(self) -> None:
        return None

    def close(self) -> None:
        return None


class NcclComm:
    """A group over an NCCL communicator that belongs to this object alone. NCCL cannot tell which rank is missing.

    Operations run on the current stream, beside nothing, and wait for no host: so a CUDA graph can hold them. Whoever
    waits for the device has the deadline; NCCL's own, which ends the process, comes long after it.
    """

    def __init__(self, group: Any, rank: int, size: int, timeout_s: float, name: str) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._timeout_s = timeout_s
        self._name = name
        self._sum = _on_current_stream(dist.AllreduceOptions())
        self._gather = _on_current_stream(AllgatherOptions())
        self._from_rank_0 = _on_current_stream(dist.BroadcastOptions())
        self._from_rank_0.rootRank = self._from_rank_0.rootTensor = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._run("all_reduce", lambda: self._group.allreduce([x], self._sum))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        self._run("all_gather", lambda: self._group._allgather_base(out, x.contiguous(), self._gather))
        return out

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        widest = max(widths)
        padded = x if x.shape[1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        blocks = x.new_empty(self.size, x.shape[0], widest)
        self._run("gather", lambda: self._group._allgather_base(blocks, padded.contiguous(), self._gather))
        if self.rank != 0:
            return None
        return torch.cat([block[:, :width] for block, width in zip(blocks, widths, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        buffer = x.contiguous()
        self._run("broadcast", lambda: self._group.broadcast([buffer], self._from_rank_0))
        return x if buffer is x else x.copy_(buffer)

    def start_send(self, x: Tensor) -> Any:
        """Beside what follows on the current stream."""
        x = x.contiguous()
        return x, self._explained("send", lambda: self._group.send([x], 1 - self.rank, 0))

    def finish_send(self, sending: Any) -> None:
        self._explained("send", sending[1].wait)

    def recv(self, x: Tensor) -> Tensor:
        self._run("receive", lambda: self._group.recv([x], 1 - self.rank, 0))
        return x

    def warm_up(self, device: torch.device, sends: bool) -> None:
        """Make what NCCL makes at first use, which no graph may hold: every rank calls this, with what it is for.

        ``sends``: a pair, in which rank 0 sends to rank 1.
        """
        x = torch.zeros(1, device=device)
        if not sends:
            self.all_reduce(x)
        elif self.rank == 0:
            self.finish_send(self.start_send(x))
        else:
            self.recv(x)

    def abort(self) -> None:
        if self._group is not None:
            self._group.abort()

    def close(self) -> None:
        self._group = None

    def _run(self, operation: str, start: Callable[[], Any]) -> None:
        def run() -> None:
            if (work := start()) is not None:  # torch gives none for what is on the current stream
                work.wait()

        self._explained(operation, run)

    def _explained(self, operation: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise self._explain(f"{self._name} {operation}", error) from error

    def _explain(self, operation: str, error: RuntimeError) -> MeshError:
        if "imed out" in str(error):
            return CollectiveTimeout(operation, self._timeout_s)
        return PeerLost(operation, str(error).splitlines()[0])


def open_nccl_comm(
    store: dist.Store, rank: int, size: int, timeout_s: float, name: str, device: torch.device
) -> NcclComm:
    """A communicator of its own for one group of ranks, connected: every rank of it calls this at once."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=_WATCHDOG_FACTOR * timeout_s)
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return NcclComm(group, rank, size, timeout_s, name)


def _on_current_stream(options: Any) -> Any:
    """Not on a stream of NCCL's own, with events to and fro."""
    options.asyncOp = False
    return options
