"""A rank's place in a mesh, and how ranks are called where people read of them.

Rank = stage * tp_size + tp_rank. Of a mesh of 2 stages x 3 tensor ranks:

    stage 0   0  1  2
    stage 1   3  4  5
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import TlsFiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Member:
    """A rank of a mesh. ``pid`` and ``host`` are known once it has come to the rendezvous."""

    rank: int
    stage: int
    tp_rank: int
    pid: int | None = None
    host: str = ""

    def __str__(self) -> str:
        process = "" if self.pid is None else f", pid {self.pid} on {self.host}"
        return f"stage {self.stage} tensor rank {self.tp_rank} (rank {self.rank}{process})"


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
    timeout_s: float  # of one collective or hand-off
    form_timeout_s: float = 120.0  # of each wait for the other ranks while the mesh forms
    tls: TlsFiles | None = None

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.epoch, self.secret, self.tls)

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

    def member(self, rank: int, pid: int | None = None, host: str = "") -> Member:
        return Member(rank, rank // self.tp_size, rank % self.tp_size, pid, host)
