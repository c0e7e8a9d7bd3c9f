"""Rank processes for tests: real processes, real groups, no Ray. One pool is formed into mesh after mesh."""

from __future__ import annotations

import multiprocessing
import secrets
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from shardray.parallel.credentials import Credentials
from shardray.parallel.spans import Span
from shardray.runtime.engine.assignment import ShardAssignment, ShardInfo
from shardray.runtime.engine.request import EngineRequest, EngineStats, TokenOutput

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Arrival:
    """A request that is submitted once the engine has published ``after_step`` times."""

    request: EngineRequest
    after_step: int = 0


@dataclass(frozen=True)
class Served:
    """What a mesh gave for a list of arrivals."""

    outputs: dict[str, list[TokenOutput]]
    stats: EngineStats

    def token_ids(self, request_id: str) -> list[int]:
        return [output.token_id for output in self.outputs[request_id] if output.token_id is not None]


class RankPool:
    """Processes that take places in meshes. ``mesh`` forms one over the first tp_size * pp_size of them.

    More are started when a mesh needs them. After a test that failed within a mesh, ``is_sound`` is False.
    """

    def __init__(self, size: int = 0) -> None:
        self.is_sound = True
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        self._grow_to(size)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    @contextmanager
    def mesh(self, folder: Path, tp_size: int, pp_size: int, **fields: Any) -> Iterator[FormedMesh]:
        """A formed mesh. ``fields`` override the assignment's; ``{rank}`` in ``device`` stands for the rank."""
        size = tp_size * pp_size
        self._grow_to(size)
        epoch, secret = secrets.token_hex(4), secrets.token_hex(8)
        host, port = self.call(0, "open_rendezvous", (Credentials(epoch, secret, fields.get("tls")), size))
        shared = {
            "epoch": epoch,
            "secret": secret,
            "tp_size": tp_size,
            "pp_size": pp_size,
            "nodes": ("here",) * size,
            "store_host": host,
            "store_port": port,
            "bind_host": LOOPBACK,
            "device": "cpu",
            "model_dir": str(folder),
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_memory_bytes": 64 << 20,
        } | fields
        device = shared.pop("device")
        places = [ShardAssignment(rank=rank, device=device.format(rank=rank), **shared) for rank in range(size)]
        self.is_sound = False
        infos = self.call_all(size, "form", places)
        try:
            yield FormedMesh(self, infos)
        finally:
            self.call_all(size, "close", [None] * size)
        self.is_sound = True

    def call(self, rank: int, method: str, argument: Any = None) -> Any:
        self.send(rank, method, argument)
        return self.receive(rank)

    def call_all(self, size: int, method: str, arguments: Sequence[Any]) -> list[Any]:
        for rank in range(size):
            self.send(rank, method, arguments[rank])
        answers = [self._pipes[rank].recv() for rank in range(size)]
        return [_unwrap(rank, answer) for rank, answer in enumerate(answers)]

    def send(self, rank: int, method: str, argument: Any = None) -> None:
        self._pipes[rank].send((method, argument))

    def receive(self, rank: int) -> Any:
        return _unwrap(rank, self._pipes[rank].recv())

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            process.kill()

    def _grow_to(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(len(self._pipes), size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)


class RankError(RuntimeError):
    """What a rank raised, with its traceback as text."""


def _unwrap(rank: int, answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if kind == "error":
        raise RankError(f"rank {rank}: {value}")
    return value


@dataclass(frozen=True)
class FormedMesh:
    pool: RankPool
    infos: list[ShardInfo]

    def serve(self, arrivals: Sequence[Arrival | EngineRequest]) -> Served:
        """Run a list of requests to their ends on the leader."""
        wrapped = [item if isinstance(item, Arrival) else Arrival(item) for item in arrivals]
        outputs, stats = self.pool.call(0, "serve", wrapped)
        return Served(outputs, stats)


def _rank_main(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    rank = _Rank()
    while True:
        try:
            method, argument = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", getattr(rank, method)(argument)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))


class _Rank:
    def __init__(self) -> None:
        from shardray.runtime.engine import shard

        self._module = shard
        self._shard: shard.Shard | None = None
        self._rendezvous: shard.Rendezvous | None = None
        self._serving: threading.Thread | None = None
        self._failure: str | None = None

    def open_rendezvous(self, of: tuple[Credentials, int]) -> tuple[str, int]:
        self._rendezvous = self._module.open_rendezvous(LOOPBACK, *of)
        return self._rendezvous.host, self._rendezvous.port

    def form(self, place: ShardAssignment) -> ShardInfo:
        self._shard = self._module.form_shard(place)
        if place.rank != 0:
            self._serving = threading.Thread(target=self._serve_plans, args=(self._shard,))
            self._serving.start()
        return self._shard.info

    def serve(self, arrivals: list[Arrival]) -> tuple[dict[str, list[TokenOutput]], EngineStats]:
        assert self._shard is not None
        return _Session(self._shard.engine, arrivals).run()

    def recorded_sizes(self, _: None) -> list[int]:
        """Of the decode steps that have been recorded."""
        assert self._shard is not None
        recorded = self._shard._runner._recorded
        return [] if recorded is None else list(recorded.sizes)

    def num_programs(self, _: None) -> int:
        """Kinds of steps that run as a program of a CPU."""
        assert self._shard is not None
        programs = self._shard._runner._recorded
        return 0 if programs is None else len(programs._programs)

    def start_trace(self, _: None) -> None:
        assert self._shard is not None
        self._shard.start_trace()

    def stop_trace(self, _: None) -> tuple[list[Span], bool]:
        """What was written down, and whether anything is left of it."""
        assert self._shard is not None
        mesh = self._shard._mesh
        found = self._shard.stop_trace().found
        stand_ins = ("all_reduce", "all_gather", "gather", "broadcast", "recv", "send")
        return found, any(name in vars(part) for part in mesh._parts() for name in stand_ins)

    def close(self, _: None) -> str | None:
        assert self._shard is not None
        if self._shard.assignment.rank == 0:
            self._shard.close()
        elif self._serving is not None:
            self._serving.join()
            self._shard.close()
        self._shard = None
        if self._rendezvous is not None:
            self._rendezvous.close()
        return self._failure

    def abort(self, _: None) -> None:
        assert self._shard is not None
        self._shard.abort()

    def _serve_plans(self, shard: Any) -> None:
        self._failure = None
        try:
            shard.serve()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"


class _Session:
    """Drives an engine until every arrival has its end."""

    def __init__(self, engine: Any, arrivals: list[Arrival]) -> None:
        self._engine = engine
        self._waiting = sorted(arrivals, key=lambda arrival: arrival.after_step)
        self._outputs: dict[str, list[TokenOutput]] = {arrival.request.request_id: [] for arrival in arrivals}
        self._num_open = len(arrivals)
        self._num_steps = 0

    def run(self) -> tuple[dict[str, list[TokenOutput]], EngineStats]:
        self._submit_due()
        self._engine.run(self._publish)
        return self._outputs, self._engine.stats()

    def _publish(self, outputs: list[TokenOutput]) -> None:
        self._num_steps += 1
        for output in outputs:
            self._outputs[output.request_id].append(output)
            self._num_open -= output.finish_reason is not None
        self._submit_due()
        if not self._num_open:
            self._engine.stop()

    def _submit_due(self) -> None:
        num_live = self._num_open - len(self._waiting)
        while self._waiting and (self._waiting[0].after_step <= self._num_steps or num_live == 0):
            self._engine.submit(self._waiting.pop(0).request)
            num_live += 1
