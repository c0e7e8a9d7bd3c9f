"""One rank's view of a mesh: its groups, its neighbours, its control links.

    2 stages x 3 tensor ranks          stage 0   0  1  2        a row is a tensor group,
                                       stage 1   3  4  5        a column is a chain of pipes

Meshes are opened and closed any number of times in one process; nothing here is global. Groups of ranks on one
machine's CPUs use shared memory, others gloo (CPU) or NCCL (CUDA).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from shardray.parallel.comm import Comm, NcclComm, SoloComm, open_nccl_comm
from shardray.parallel.errors import DeviceLost, DeviceTimeout, MeshAborted, MeshError
from shardray.parallel.exchange import choose_exchange
from shardray.parallel.gloo import GlooComm, open_gloo_comm
from shardray.parallel.greeting import LinkListener, connect
from shardray.parallel.link import Link
from shardray.parallel.pipeline import MessagePipe, ShmPipe, StagePipe
from shardray.parallel.place import Member, MeshSpec
from shardray.parallel.rendezvous import Meeting, Rendezvous
from shardray.parallel.shm import ShmComm, usable
from shardray.parallel.store import join_torch_store, open_torch_store
from shardray.parallel.waiting import Waiter, poll_device, share_memory

__all__ = ["Mesh", "MeshSpec", "Rendezvous", "open_mesh"]

_SHM_CAPACITY_BYTES = 4 << 20  # of one rank's slot; larger tensors go in pieces
_SPINS = 300  # polls that keep the core, where every rank has one


@dataclass
class Mesh:
    """The open mesh of one rank. ``links`` holds every other rank on the leader, rank 0 elsewhere."""

    spec: MeshSpec
    tp: Comm
    upstream: StagePipe | None
    downstream: StagePipe | None
    links: dict[int, Link]
    _meeting: Meeting
    _aborted: threading.Event = field(default_factory=threading.Event)

    def agree_on_minimum(self, name: str, value: int, timeout_s: float | None = None) -> int:
        """The smallest of the values that all ranks bring; called once per name, by all.

        Raises CollectiveTimeout naming who brought none in time, and PeerLost soon after a rank leaves the mesh.
        """
        self._meeting.tell(name, str(value))
        answers = self._meeting.ask(name, range(self.spec.size), self._check_links, timeout_s)
        return min(map(int, answers))

    def wait_for_device(self, ready: Callable[[], bool], operation: str) -> None:
        """Poll until the device has got as far as ``ready`` tells; the core is given up between two polls.

        Raises DeviceTimeout and DeviceLost, which name this rank; PeerLost for a rank that has left the mesh, and that
        the device may be waiting for; MeshAborted.
        """
        device = f"{self.spec.member(self.spec.rank)}: {self.spec.device}"
        try:
            poll_device(ready, lambda: self._check_links(operation), self.spec.timeout_s)
        except TimeoutError:
            raise DeviceTimeout(operation, device, self.spec.timeout_s) from None
        except MeshError:
            raise
        except RuntimeError as error:
            raise DeviceLost(operation, device, str(error).splitlines()[0]) from error

    def abort(self) -> None:
        """Make every blocked operation of this rank raise MeshAborted soon. Thread-safe."""
        self._aborted.set()
        for link in self.links.values():
            link.abort()
        for part in self._parts():
            part.abort()

    def close(self) -> None:
        """Leave the mesh; never waits for other ranks. Every descriptor is closed once no tensor of it is in use."""
        for link in self.links.values():
            link.close()
        for part in self._parts():
            part.close()
        self._meeting.close()

    def _parts(self) -> list[Comm | StagePipe]:
        return [part for part in (self.tp, self.upstream, self.downstream) if part is not None]

    def _check_links(self, doing: str = "forming") -> None:
        if self._aborted.is_set():
            raise MeshAborted(f"{doing}: aborted")
        for link in self.links.values():
            link.check()


def open_mesh(spec: MeshSpec, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> Mesh:
    """Open this rank's groups, pipes and links; every rank of the mesh calls it. Raises MeshError."""
    meeting = Meeting(spec)
    opener = _Opener(spec, meeting, max_tokens, hidden_size, dtype)
    with ExitStack() as undo:
        undo.callback(meeting.close)
        meeting.introduce()
        links = opener.control_links()
        for link in links.values():
            undo.callback(link.close)
        tp = opener.tensor_group()
        undo.callback(tp.close)
        upstream = opener.pipe(spec.stage - 1) if spec.stage > 0 else None
        if upstream is not None:
            undo.callback(upstream.close)
        downstream = opener.pipe(spec.stage) if spec.stage < spec.pp_size - 1 else None
        undo.pop_all()
    return Mesh(spec, tp, upstream, downstream, links, meeting, opener.aborted)


class _Opener:
    """Opens the parts of one rank's mesh; all ranks open theirs in the same order."""

    def __init__(self, spec: MeshSpec, meeting: Meeting, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.aborted = threading.Event()
        self._spec = spec
        self._meeting = meeting
        self._max_tokens = max_tokens
        self._hidden_size = hidden_size
        self._dtype = dtype

    def control_links(self) -> dict[int, Link]:
        spec, members = self._spec, self._meeting.members
        if spec.size == 1:
            return {}
        if spec.rank != 0:
            host, port = self._meeting.ask("control", [0])[0].rsplit(":", 1)
            address = host, int(port)
            leader = connect(address, spec.credentials, spec.rank, members[0], spec.form_timeout_s, spec.timeout_s)
            return {0: leader}
        listener = LinkListener(spec.bind_host, spec.credentials)
        try:
            self._meeting.tell("control", f"{spec.bind_host}:{listener.port}")
            return listener.accept(members[1:], spec.form_timeout_s, spec.timeout_s)
        finally:
            listener.close()

    def tensor_group(self) -> Comm:
        spec = self._spec
        if spec.tp_size == 1:
            return SoloComm()
        ranks = [spec.rank_at(spec.stage, t) for t in range(spec.tp_size)]
        key, name = f"tp/{spec.stage}", f"stage {spec.stage} tensor group"
        if not self._shares_memory(ranks):
            return self._message_comm(ranks, key, name, sends=False)
        size = ShmComm.num_bytes(spec.tp_size, _SHM_CAPACITY_BYTES)
        choose_exchange()  # loaded before the ranks meet: from then on nobody has to wait for it
        memory = share_memory(self._meeting, key, spec.rank, ranks[0], ranks[1:], size)
        return ShmComm(memory, spec.tp_rank, spec.tp_size, _SHM_CAPACITY_BYTES, self._waiter(ranks), name)

    def pipe(self, from_stage: int) -> StagePipe:
        """The pipe from ``from_stage`` to the next one, in this rank's column."""
        spec = self._spec
        ranks = [spec.rank_at(from_stage, spec.tp_rank), spec.rank_at(from_stage + 1, spec.tp_rank)]
        key = f"pp/{from_stage}/{spec.tp_rank}"
        name = f"tensor rank {spec.tp_rank} pipe from stage {from_stage}"
        if not self._shares_memory(ranks):
            comm = self._message_comm(ranks, key, name, sends=True)
            return MessagePipe(comm, self._max_tokens, self._hidden_size, self._dtype, spec.device)
        size = ShmPipe.num_bytes(self._max_tokens, self._hidden_size, self._dtype)
        memory = share_memory(self._meeting, key, spec.rank, ranks[0], ranks[1:], size)
        return ShmPipe(memory, self._max_tokens, self._hidden_size, self._dtype, self._waiter(ranks), name)

    def _message_comm(self, ranks: Sequence[int], key: str, name: str, sends: bool) -> GlooComm | NcclComm:
        """``sends``: for messages between two, else for collectives."""
        spec, rank = self._spec, ranks.index(self._spec.rank)
        if spec.device.type == "cuda":
            store = self._torch_store(ranks, key)
            comm = open_nccl_comm(store, rank, len(ranks), spec.timeout_s, name, spec.device)
            comm.warm_up(spec.device, sends)
            return comm
        return open_gloo_comm(
            self._meeting.store(key), rank, self._members(ranks), spec.bind_host, spec.timeout_s, spec.form_timeout_s,
            self.aborted, name,
        )  # fmt: skip

    def _torch_store(self, ranks: Sequence[int], key: str) -> dist.Store:
        """A store of torch's own on the group's first rank: NCCL's threads use it for as long as the group lives."""
        spec, key = self._spec, f"{key}/store"
        if spec.rank == ranks[0]:
            store, port = open_torch_store(spec.bind_host)
            self._meeting.tell(key, f"{spec.bind_host}:{port}")
            return store
        host, port_text = self._meeting.ask(key, ranks[:1])[0].rsplit(":", 1)
        return join_torch_store(host, int(port_text), spec.form_timeout_s)

    def _shares_memory(self, ranks: Sequence[int]) -> bool:
        nodes = {self._spec.nodes[rank] for rank in ranks}
        return self._spec.device.type == "cpu" and len(nodes) == 1 and usable()

    def _waiter(self, ranks: Sequence[int]) -> Waiter:
        ranks_here = self._spec.nodes.count(self._spec.nodes[self._spec.rank])
        spins = _SPINS if ranks_here <= (os.cpu_count() or 1) else 0
        return Waiter(self._members(ranks), self._spec.timeout_s, self.aborted, spins)

    def _members(self, ranks: Sequence[int]) -> list[Member]:
        return [self._meeting.members[rank] for rank in ranks]
