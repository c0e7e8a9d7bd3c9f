"""Real processes that take places in meshes: each opens its rank's mesh, does some work on it, and closes it."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from shardray.parallel.credentials import Credentials
from shardray.parallel.mesh import Mesh, MeshSpec, Rendezvous, open_mesh
from shardray.parallel.tls import TlsFiles

LOOPBACK = "127.0.0.1"
SECRET = "open sesame"
ANSWER_TIMEOUT_S = 120.0
HIDDEN_SIZE, MAX_TOKENS = 24, 32
Work = Callable[..., Any]


@dataclass(frozen=True)
class Failure:
    """What a rank's work raised."""

    kind: str
    message: str
    missing: tuple[int, ...]
    after_s: float  # since the last ``start_clock`` of that rank


@dataclass(frozen=True)
class Gone:
    """A rank whose process gave no answer, because it was killed or stopped."""


def own_place(rank: int, tp_size: int, pp_size: int, store_port: int, epoch: str, **fields: Any) -> MeshSpec:
    defaults = {
        "secret": SECRET,
        "nodes": ("here",) * (tp_size * pp_size),
        "store_host": LOOPBACK,
        "bind_host": LOOPBACK,
        "device": torch.device("cpu"),
        "timeout_s": 20.0,
        "form_timeout_s": 20.0,
    }
    return MeshSpec(epoch, rank=rank, tp_size=tp_size, pp_size=pp_size, store_port=store_port, **(defaults | fields))


def open_rendezvous(epoch: str, size: int, tls: TlsFiles | None = None) -> Rendezvous:
    return Rendezvous(LOOPBACK, Credentials(epoch, SECRET, tls), size)


class RankProcesses:
    """A pool; ``run`` gives one outcome a rank: what the work returned, a Failure, or Gone."""

    def __init__(self, size: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._places: list[tuple[BaseProcess, Connection]] = [self._start() for _ in range(size)]

    def run(
        self, work: Work, *args: Any, tp_size: int, pp_size: int = 1, lost: Sequence[int] = (), **fields: Any
    ) -> list[Any]:
        """``work(mesh, *args)`` on every rank of a new mesh. The work itself kills or stops the ranks in ``lost``."""
        epoch = secrets.token_hex(4)
        size = tp_size * pp_size
        rendezvous = open_rendezvous(epoch, size, fields.get("tls"))
        for rank in range(size):
            place = own_place(rank, tp_size, pp_size, rendezvous.port, epoch, **fields)
            self._places[rank][1].send((work, place, args))
        outcomes = [Gone() if rank in lost else self._answer(rank) for rank in range(size)]
        rendezvous.close()
        for rank in lost:
            self._replace(rank)
        return outcomes

    def pid(self, rank: int) -> int:
        return self._places[rank][0].pid or 0

    def close(self) -> None:
        for process, pipe in self._places:
            pipe.close()
            process.kill()
            process.join()

    def _answer(self, rank: int) -> Any:
        pipe = self._places[rank][1]
        if not pipe.poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"rank {rank} gave no answer within {ANSWER_TIMEOUT_S} s")
        return pipe.recv()

    def _replace(self, rank: int) -> None:
        process, pipe = self._places[rank]
        pipe.close()
        process.kill()
        process.join()
        self._places[rank] = self._start()

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_main, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours


@contextmanager
def another_mesh(mesh: Mesh, epoch: str, **fields: Any) -> Iterator[Mesh]:
    """A second mesh of the same ranks, in the same processes."""
    spec, rendezvous = mesh.spec, None
    if spec.rank == 0:
        rendezvous = open_rendezvous(epoch, spec.size, spec.tls)
        for link in mesh.links.values():
            link.send(str(rendezvous.port).encode())
    port = rendezvous.port if rendezvous is not None else int(mesh.links[0].recv(ANSWER_TIMEOUT_S))
    place = own_place(spec.rank, spec.tp_size, spec.pp_size, port, epoch, **({"nodes": spec.nodes} | fields))
    again = open_mesh(place, MAX_TOKENS, HIDDEN_SIZE, torch.float32)
    try:
        yield again
    finally:
        again.close()
        if rendezvous is None:
            mesh.links[0].send(b"")
        else:
            for link in mesh.links.values():
                link.recv(ANSWER_TIMEOUT_S)
            rendezvous.close()


_clock = 0.0


def start_clock() -> None:
    """From here on counts a Failure's ``after_s``."""
    global _clock
    _clock = time.monotonic()


def end_this_process(how: signal.Signals) -> None:
    os.kill(os.getpid(), how)


def _main(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            work, place, args = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(work, place, args))


def _outcome(work: Work, place: MeshSpec, args: tuple[Any, ...]) -> Any:
    start_clock()
    try:
        mesh = open_mesh(place, MAX_TOKENS, HIDDEN_SIZE, torch.float32)
        try:
            return work(mesh, *args)
        finally:
            mesh.close()
    except Exception as error:
        missing = tuple(getattr(error, "missing", ()))
        return Failure(type(error).__name__, str(error), missing, time.monotonic() - _clock)
