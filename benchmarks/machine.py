"""The machine: what it can do at best, measured just before, and whether it has something else to do."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import processes

BUSY_CORES = 0.15  # other processes may use this much of a core
_BANDWIDTH_BYTES = 256 << 20  # far above any last-level cache's size per core
_MATRIX_SIZE = 2048
_NUM_TRIES = 5
_SHORTEST_LOOK_S = 0.1  # ten ticks of the clock that CPU time is counted with


@dataclass(frozen=True)
class Machine:
    cpu: str
    num_cores: int
    memory_bytes: int
    read_bytes_per_s: float  # plain reads of memory, out of huge pages where the system has them
    bf16_flop_per_s: float  # a large matrix product

    def floor_tok_s(self, weight_bytes: int) -> float:
        """A single stream reads all weights for every token; it cannot be faster than this."""
        return self.read_bytes_per_s / weight_bytes


def measure_machine(num_threads: int) -> Machine:
    """In a process of its own, so that the harness stays small and idle."""
    command = [sys.executable, "-m", "benchmarks.machine", str(num_threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return Machine(**json.loads(done.stdout))


class OthersMeter:
    """CPU time that others use, from its making to each reading.

    Others are all processes but this one, and ``roots`` with their descendants; ours, unless others are given.
    """

    def __init__(self, roots: Sequence[int] | None = None) -> None:
        self._roots = [os.getpid()] if roots is None else roots
        self._began_s = time.perf_counter()
        self._others_s = self._read_others_s()

    def cores(self) -> float:
        """Cores in use by others on average, at least 0. Times tick in hundredths of a second."""
        took_s = time.perf_counter() - self._began_s
        return max(0.0, (self._read_others_s() - self._others_s) / took_s)

    def _read_others_s(self) -> float:
        own = {os.getpid(), *(pid for root in self._roots for pid in processes.process_tree(root))}
        return processes.machine_cpu_seconds() - processes.cpu_seconds([*own])


def wait_until_quiet(timeout_s: float, window_s: float = 0.5) -> float:
    """Cores in use over the last window, by whatever we started too: below BUSY_CORES, or ``timeout_s`` ran out.

    A window is never longer than ``timeout_s``, but for the shortest that says anything.
    """
    deadline_s = time.perf_counter() + timeout_s
    window_s = max(_SHORTEST_LOOK_S, min(window_s, timeout_s))
    while True:
        meter = OthersMeter(())
        time.sleep(window_s)
        cores = meter.cores()
        if cores < BUSY_CORES or time.perf_counter() >= deadline_s:
            return cores


def _measure(num_threads: int) -> Machine:
    import torch

    torch.set_num_threads(num_threads)
    words = words_to_read()
    left, right = (torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=torch.bfloat16) for _ in range(2))
    return Machine(
        cpu=_cpu_model(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        read_bytes_per_s=_BANDWIDTH_BYTES / min(_time_s(words.sum) for _ in range(_NUM_TRIES)),
        bf16_flop_per_s=2 * _MATRIX_SIZE**3 / min(_time_s(lambda: left @ right) for _ in range(_NUM_TRIES)),
    )


def words_to_read() -> Any:
    """A tensor in memory of the kind that the engine keeps its weights in."""
    import torch

    from shardray.parallel import arena

    return arena.empty((_BANDWIDTH_BYTES // 4,), torch.float32).fill_(1.0)


def _time_s(work: object) -> float:
    assert callable(work)
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or (
            platform.processor()
        )


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(int(sys.argv[1])))))
