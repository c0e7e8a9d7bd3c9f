"""Collectives over TCP, for ranks on the CPUs of several machines: direct messages between every two ranks, over gloo.

Messages rather than gloo's own collectives, because a message that does not come names the rank that owes it, and
because the sums are then the same as in shared memory, bit for bit. A small sum takes one round (everybody sends
everything to everybody), a large one two (each rank sums one chunk): the same bytes on the wire as a ring.
"""

from __future__ import annotations

import datetime
import logging
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardray.parallel.comm import sum_in_rank_order
from shardray.parallel.errors import CollectiveTimeout, MeshAborted, MeshError, PeerLost
from shardray.parallel.place import Member

_ONE_ROUND_BYTES = 64 << 10
_TAG, _ABORT_TAG = 0, 1
_AT_ONCE = datetime.timedelta(milliseconds=1)
_LATE = re.compile("[Tt]imed out|Application timeout")  # of its own, or through another message of the group
_NOISE = re.compile(r"^\[[^\]]*\] |\. This is typically .*$")  # source lines and advice around gloo's own words
_log = logging.getLogger(__name__)

_Pending = list[tuple[int, Any]]  # (rank of the group, gloo's work)
_Failures = list[tuple[int, RuntimeError]]


class GlooComm:
    """A group over a gloo process group that belongs to this object alone."""

    def __init__(
        self,
        group: Any,  # ProcessGroupGloo, whose stub lacks its own methods
        rank: int,
        members: Sequence[Member],
        timeout_s: float,
        aborted: threading.Event,
        name: str,
    ) -> None:
        self.rank = rank
        self.size = len(members)
        self._group = group
        self._members = members
        self._peers = [peer for peer in range(self.size) if peer != rank]
        self._timeout_s = timeout_s
        self._aborted = aborted
        self._name = name

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1)
        if self.size == 2 or flat.numel() * flat.element_size() <= _ONE_ROUND_BYTES:
            self._sum("all_reduce", [flat] * self.size, flat)
        else:
            chunks = flat.tensor_split(self.size)
            self._sum("all_reduce", chunks, chunks[self.rank])
            self._exchange("all_reduce", [chunks[self.rank]] * self.size, chunks)
        return flat.view(x.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        out[self.rank] = x
        self._exchange("all_gather", [x.contiguous()] * self.size, out)
        return out

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        if self.rank != 0:
            x = x.contiguous()
            self._finish("gather", self._start_send(x, 0))
            return None
        blocks = [x, *(x.new_empty(x.shape[0], width) for width in widths[1:])]
        self._finish("gather", [work for peer in self._peers for work in self._start_recv(blocks[peer], peer)])
        return torch.cat(blocks, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        buffer = x.contiguous()
        if self.rank == 0:
            self._finish("broadcast", [work for peer in self._peers for work in self._start_send(buffer, peer)])
            return x
        self._finish("broadcast", self._start_recv(buffer, 0))
        return x if buffer is x else x.copy_(buffer)

    def start_send(self, x: Tensor) -> tuple[Tensor, _Pending]:
        x = x.contiguous()
        return x, self._start_send(x, self._peers[0])

    def finish_send(self, sending: tuple[Tensor, _Pending]) -> None:
        self._finish("send", sending[1])

    def recv(self, x: Tensor) -> Tensor:
        self._finish("receive", self._start_recv(x, self._peers[0]))
        return x

    def abort(self) -> None:
        """A receive that misses its deadline closes every connection of a gloo group, whoever waits on them."""
        self._aborted.set()
        if (group := self._group) is None:
            return
        try:
            group.recv([torch.empty(1)], self._peers[0], _ABORT_TAG).wait(_AT_ONCE)
        except RuntimeError as error:
            _log.debug("%s aborted: %s", self._name, error)

    def close(self) -> None:
        self._group = None

    def _sum(self, operation: str, outgoing: Sequence[Tensor], out: Tensor) -> None:
        """``out`` becomes the sum of the ranks' parts of it; this rank's own part is in it."""
        parts = [out if peer == self.rank else torch.empty_like(out) for peer in range(self.size)]
        self._exchange(operation, outgoing, parts)
        sum_in_rank_order(parts, out)

    def _exchange(self, operation: str, outgoing: Sequence[Tensor], incoming: Sequence[Tensor] | Tensor) -> None:
        """Send one tensor to each of the other ranks and receive one from each."""
        sends = [work for peer in self._peers for work in self._start_send(outgoing[peer], peer)]
        receives = [work for peer in self._peers for work in self._start_recv(incoming[peer], peer)]
        self._finish(operation, receives + sends)

    def _start_send(self, x: Tensor, peer: int) -> _Pending:
        return [(peer, self._start("send", x, peer))] if x.numel() else []

    def _start_recv(self, x: Tensor, peer: int) -> _Pending:
        return [(peer, self._start("receive", x, peer))] if x.numel() else []

    def _start(self, kind: str, x: Tensor, peer: int) -> Any:
        if self._group is None:
            raise RuntimeError(f"{self._name}: the mesh was closed")
        start = self._group.send if kind == "send" else self._group.recv
        try:
            return start([x], peer, _TAG)
        except RuntimeError as error:
            raise self._explain(kind, [(peer, error)]) from error

    def _finish(self, operation: str, pending: _Pending) -> None:
        """Wait for all of ``pending`` within one deadline; once one has failed, only ask how the others stand."""
        deadline = time.monotonic() + self._timeout_s
        failures: _Failures = []
        for peer, work in pending:
            left_s = 0.0 if failures else deadline - time.monotonic()
            try:
                work.wait(max(_AT_ONCE, datetime.timedelta(seconds=left_s)))
            except RuntimeError as error:
                failures.append((peer, error))
        if failures:
            raise self._explain(operation, failures) from failures[0][1]

    def _explain(self, operation: str, failures: _Failures) -> MeshError:
        what = f"{self._name} {operation}"
        if self._aborted.is_set():
            return MeshAborted(f"{what}: aborted")
        broken = [(peer, error) for peer, error in failures if not _LATE.search(str(error))]
        members = [self._members[peer] for peer in sorted({peer for peer, _ in broken or failures})]
        if broken:
            return PeerLost(what, _cause(broken[0][1]), members)
        return CollectiveTimeout(what, self._timeout_s, members)


def open_gloo_comm(
    store: dist.Store,
    rank: int,
    members: Sequence[Member],
    bind_host: str,
    timeout_s: float,
    form_timeout_s: float,
    aborted: threading.Event,
    name: str,
) -> GlooComm:
    """Connect one group of ranks over TCP; this rank listens on ``bind_host``. Raises PeerLost."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_host)]
    options._timeout = datetime.timedelta(seconds=form_timeout_s)
    try:
        group = dist.ProcessGroupGloo(store, rank, len(members), options)
    except RuntimeError as error:
        others = [member for index, member in enumerate(members) if index != rank]
        raise PeerLost(f"opening {name}", _cause(error), others) from error
    return GlooComm(group, rank, members, timeout_s, aborted, name)


def _cause(error: RuntimeError) -> str:
    return _NOISE.sub("", str(error).splitlines()[0])
