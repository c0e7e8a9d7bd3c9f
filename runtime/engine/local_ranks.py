"""A mesh on this machine without Ray: one rank in this process, each of the others in a plain process of its own.

Such a process is given its assignment on stdin and says on stdout how forming went. It ends with its leader, whether
that says goodbye or is just gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

import msgspec

from shardray.parallel.errors import MeshAborted, MeshError
from shardray.runtime.engine.assignment import ShardAssignment
from shardray.runtime.engine.shard import Rendezvous, Shard, form_shard, open_rendezvous, read_plan

_FORMED = "formed"
_GOODBYE_TIMEOUT_S = 10.0


class LocalMesh:
    """A formed mesh, seen from its leader."""

    def __init__(self, shard: Shard, others: _OtherRanks | None) -> None:
        self.engine = shard.engine
        self._shard = shard
        self._others = others

    def close(self) -> None:
        """Leave the mesh, once the engine has stopped, and end the other ranks."""
        self._shard.close()
        if self._others is not None:
            self._others.close()


def form_here(leader: ShardAssignment) -> LocalMesh:
    """Form the mesh of which ``leader`` is rank 0; ``cuda`` as its device stands for one device a rank.

    Several ranks on CPUs are kept on cores of their own, if there are as many. Raises what ``form_shard`` does, and
    MeshError for a rank that could not form.
    """
    size = leader.tp_size * leader.pp_size
    if size == 1:
        return LocalMesh(form_shard(_place(leader, 0)), None)
    read_plan(leader)  # before any process is started for what cannot be
    rendezvous = open_rendezvous(leader.bind_host, leader.credentials, size)
    leader = msgspec.structs.replace(leader, store_host=rendezvous.host, store_port=rendezvous.port)
    others = _OtherRanks([_place(leader, rank) for rank in range(1, size)], rendezvous)
    try:
        with ThreadPoolExecutor(1) as own:  # forming pins its thread, which may not be our caller's
            return LocalMesh(own.submit(form_shard, _place(leader, 0), rendezvous=rendezvous).result(), others)
    except MeshAborted:
        others.close()
        raise MeshError(others.failure or "forming was aborted") from None
    except BaseException:
        others.close()
        raise


def _place(leader: ShardAssignment, rank: int) -> ShardAssignment:
    device = f"cuda:{rank}" if leader.device == "cuda" else leader.device
    cores, size, count = sorted(os.sched_getaffinity(0)), leader.tp_size * leader.pp_size, leader.num_threads
    has_room = device == "cpu" and size > 1 and size * count <= len(cores)
    own = tuple(cores[rank * count : (rank + 1) * count]) if has_room else ()
    return msgspec.structs.replace(leader, rank=rank, device=device, cpu_ids=own)


class _OtherRanks:
    """The processes of all ranks but the leader."""

    def __init__(self, places: Sequence[ShardAssignment], rendezvous: Rendezvous) -> None:
        self.failure: str | None = None  # of the first one that could not form
        self._rendezvous = rendezvous
        self._processes = [_start(place) for place in places]
        for place, process in zip(places, self._processes, strict=True):
            name = f"rank-{place.rank}"
            threading.Thread(target=self._watch, args=(place.rank, process), name=name, daemon=True).start()

    def close(self) -> None:
        """Wait until they have followed their leader out of the mesh; end those that do not."""
        self._rendezvous.close()
        for process in self._processes:
            try:
                process.wait(_GOODBYE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        answer = process.stdout.readline().strip()
        if answer != _FORMED:
            reason = answer or f"its process ended with code {process.wait()}"
            self.failure = self.failure or f"rank {rank} could not form: {reason}"
            self._rendezvous.abort()


def _start(place: ShardAssignment) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "shardray.runtime.engine.local_ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the leader to handle
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(place).decode() + "\n")
    process.stdin.close()
    return process


def _take_stdout() -> TextIO:
    """What our leader reads. What libraries print (NCCL its log) goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def main() -> int:
    """The life of a rank that is not the leader."""
    place, answers = msgspec.json.decode(sys.stdin.readline(), type=ShardAssignment), _take_stdout()
    try:
        shard = form_shard(place)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=answers, flush=True)
        return 1
    print(_FORMED, file=answers, flush=True)
    try:
        shard.serve()
    except MeshError:
        return 1  # the leader tells its user what broke the mesh, or is gone
    finally:
        shard.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
