"""One rank's view of a mesh: its place, its groups, its neighbours, its control links.

    ranks of a mesh of 2 stages x 3 tensor ranks          stage 0   0  1  2
    (rank = stage * tp_size + tp_rank)                    stage 1   3  4  5

A row is a tensor group, a column is a chain of pipes. Meshes are opened and closed any number of times in one process;
nothing here is global. Groups of ranks on one machine's CPUs use shared memory, others gloo (CPU) or NCCL (CUDA).
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from shardray.parallel import link as control
from shardray.parallel.comm import Comm, SoloComm, open_torch_comm
from shardray.parallel.errors import CollectiveTimeout
from shardray.parallel.pipeline import ShmPipe, StagePipe, TorchPipe
from shardray.parallel.shm import ShmComm, Waiter, share_memory, usable

_SHM_CAPACITY_BYTES = 4 << 20  # of one rank's slot; larger tensors go in pieces


@dataclass(frozen=True)
class MeshSpec:
    """What every rank of a mesh has to agree on, and its own place in it."""

    epoch: str
    secret: str
    rank: int
    tp_size: int
    pp_size: int
    nodes: tuple[str, ...]  # of every rank; equal names share a machine
    store_host: str
    store_port: int
    bind_host: str
    device: torch.device
    timeout_s: float
    form_timeout_s: float = 120.0

    @property
    def stage(self) -> int:
        return self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def size(self) -> int:
        return self.tp_size * self.pp_size

    def rank_at(self, stage: int, tp_rank: int) -> int:
        return stage * self.tp_size + tp_rank


class Rendezvous:
    """The store through which the ranks of a mesh find each other; kept by the leader's process."""

    def __init__(self, bind_host: str) -> None:
        listener = socket.create_server((bind_host, 0))
        self.host = bind_host
        self.port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            bind_host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


@dataclass
class Mesh:
    """The open mesh of one rank. ``links`` holds every other rank on the leader, rank 0 elsewhere."""

    spec: MeshSpec
    tp: Comm
    upstream: StagePipe | None
    downstream: StagePipe | None
    links: dict[int, control.Link]
    _store: dist.Store
    _aborted: threading.Event = field(default_factory=threading.Event)

    def agree_on_minimum(self, name: str, value: int) -> int:
        """The smallest of the values that all ranks bring; called once per name, by all."""
        self._store.set(f"{name}/{self.spec.rank}", str(value))
        keys = [f"{name}/{rank}" for rank in range(self.spec.size)]
        return min(int(self._store.get(key)) for key in keys)

    def abort(self) -> None:
        """Make every blocked operation of this rank raise MeshAborted soon. Thread-safe."""
        self._aborted.set()
        for link in self.links.values():
            link.abort()

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        for part in (self.tp, self.upstream, self.downstream):
            if part is not None:
                part.close()


def open_mesh(spec: MeshSpec, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> Mesh:
    """Open this rank's groups, pipes and links; every rank of the mesh calls it. Raises MeshError."""
    store = dist.PrefixStore(spec.epoch, _connect_store(spec))
    opener = _Opener(spec, store, max_tokens, hidden_size, dtype)
    return Mesh(
        spec=spec,
        tp=opener.tensor_group(),
        upstream=opener.pipe(spec.stage - 1) if spec.stage > 0 else None,
        downstream=opener.pipe(spec.stage) if spec.stage < spec.pp_size - 1 else None,
        links=opener.control_links(),
        _store=store,
        _aborted=opener.aborted,
    )


class _Opener:
    """Opens the parts of one rank's mesh; all ranks open theirs in the same order."""

    def __init__(
        self, spec: MeshSpec, store: dist.Store, max_tokens: int, hidden_size: int, dtype: torch.dtype
    ) -> None:
        self.aborted = threading.Event()
        self._spec = spec
        self._store = store
        self._max_tokens = max_tokens
        self._hidden_size = hidden_size
        self._dtype = dtype
        store.set(f"pid/{spec.rank}", str(os.getpid()))

    def tensor_group(self) -> Comm:
        spec = self._spec
        if spec.tp_size == 1:
            return SoloComm()
        name = f"stage {spec.stage} tensor group"
        ranks = [spec.rank_at(spec.stage, t) for t in range(spec.tp_size)]
        key = f"tp/{spec.stage}"
        if not self._shares_memory(ranks):
            prefix = dist.PrefixStore(key, self._store)
            return open_torch_comm(
                prefix, spec.tp_rank, spec.tp_size, spec.device, spec.bind_host, spec.timeout_s, name
            )
        size = ShmComm.num_bytes(spec.tp_size, _SHM_CAPACITY_BYTES)
        memory = share_memory(self._store, key, spec.tp_rank == 0, size)
        return ShmComm(memory, spec.tp_rank, spec.tp_size, _SHM_CAPACITY_BYTES, self._waiter(ranks), name)

    def pipe(self, from_stage: int) -> StagePipe:
        """The pipe from ``from_stage`` to the next one, in this rank's column."""
        spec, sends = self._spec, self._spec.stage == from_stage
        ranks = [spec.rank_at(from_stage, spec.tp_rank), spec.rank_at(from_stage + 1, spec.tp_rank)]
        key = f"pp/{from_stage}/{spec.tp_rank}"
        name = f"pipe of tensor rank {spec.tp_rank} from stage {from_stage}"
        if self._shares_memory(ranks):
            size = ShmPipe.num_bytes(self._max_tokens, self._hidden_size, self._dtype)
            memory = share_memory(self._store, key, sends, size)
            return ShmPipe(memory, self._max_tokens, self._hidden_size, self._dtype, self._waiter(ranks), name)
        prefix = dist.PrefixStore(key, self._store)
        comm = open_torch_comm(prefix, 0 if sends else 1, 2, spec.device, spec.bind_host, spec.timeout_s, name)
        peer = 1 if sends else 0
        return TorchPipe(comm, peer, self._max_tokens, self._hidden_size, self._dtype, spec.device)

    def control_links(self) -> dict[int, control.Link]:
        spec = self._spec
        if spec.size == 1:
            return {}
        if spec.rank != 0:
            host, port = self._store.get("control").decode().rsplit(":", 1)
            link = control.connect(host, int(port), spec.epoch, spec.secret, spec.rank, spec.form_timeout_s)
            return {0: link}
        listener = control.LinkListener(spec.bind_host, spec.epoch, spec.secret)
        try:
            self._store.set("control", f"{spec.bind_host}:{listener.port}")
            return listener.accept(set(range(1, spec.size)), spec.form_timeout_s)
        finally:
            listener.close()

    def _shares_memory(self, ranks: list[int]) -> bool:
        nodes = {self._spec.nodes[rank] for rank in ranks}
        return self._spec.device.type == "cpu" and len(nodes) == 1 and usable()

    def _waiter(self, ranks: list[int]) -> Waiter:
        pids = [int(self._store.get(f"pid/{rank}")) for rank in ranks]
        ranks_here = self._spec.nodes.count(self._spec.nodes[self._spec.rank])
        spins = 300 if ranks_here <= (os.cpu_count() or 1) else 0
        return Waiter(pids, self._spec.timeout_s, self.aborted, spins)


def _connect_store(spec: MeshSpec) -> dist.Store:
    if spec.size == 1:
        return dist.HashStore()
    timeout = datetime.timedelta(seconds=spec.form_timeout_s)
    try:
        return dist.TCPStore(spec.store_host, spec.store_port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        where = f"reaching the leader's rendezvous at {spec.store_host}:{spec.store_port}"
        raise CollectiveTimeout(where, spec.form_timeout_s, (0,)) from error
