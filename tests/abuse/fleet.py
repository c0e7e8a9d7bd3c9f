"""A real ``shardray serve`` of a tiny model, and what its processes hold."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path

import psutil

from shardray.runtime.client import Client
from shardray.v1 import control_pb2
from tests.chaos.served import Served
from tests.chaos.tiny import save_tiny

MAX_NUM_SEQS = 8
MAX_QUEUED = 16
DEADLINE_S = 60.0  # of requests whose clients set none


class AbusedFleet(Served):
    """One replica on ``num_hosts`` tensor ranks."""

    def __init__(self, folder: Path, num_hosts: int = 1) -> None:
        super().__init__(
            [
                f"model.source={save_tiny(folder)}",
                "model.dtype=float32",
                f"parallel.tensor_parallel_size={num_hosts}",
                "engine.kv_memory_bytes=48MiB",
                "engine.prefix_caching=false",  # callers send one prompt, and each is to be computed
                f"engine.max_num_seqs={MAX_NUM_SEQS}",
                f"limits.max_queued_requests={MAX_QUEUED}",
                f"limits.default_deadline_s={DEADLINE_S}",
                "grpc.listen=127.0.0.1:0",
            ]
        )
        self.driver = psutil.Process(self._command.process.pid)

    def processes(self) -> dict[str, psutil.Process]:
        hosts = {f"host {number}": psutil.Process(pid) for number, pid in enumerate(self.host_pids())}
        return {"driver": self.driver, **hosts}

    def left(self, timeout_s: float = 20.0) -> list[str]:
        """What the fleet still holds of any request, once it had ``timeout_s`` to let go of it."""
        deadline = time.monotonic() + timeout_s
        with Client(self.address) as client:
            while (held := _held(client.fleet())) and time.monotonic() < deadline:
                time.sleep(0.1)
        return held


class Watch(ABC):
    """Calls ``look`` every ``every_s`` in a thread of its own."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._began_s = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @abstractmethod
    def look(self, time_s: float) -> None:
        """``time_s``: since it began."""

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.look(time.monotonic() - self._began_s)
            self._stop.wait(self._every_s)


class MemoryWatch(Watch):
    """Resident memory of every process of the fleet."""

    def __init__(self, processes: dict[str, psutil.Process], every_s: float = 1.0) -> None:
        self._processes = processes
        self._samples: dict[str, list[tuple[float, int]]] = defaultdict(list)
        super().__init__(every_s)

    def look(self, time_s: float) -> None:
        for name, process in self._processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._samples[name].append((time_s, process.memory_info().rss))

    def growth(self, after_s: float) -> dict[str, float]:
        """By process: the most after ``after_s`` over what it was then, less one."""
        return {name: max(kept) / kept[0] - 1.0 for name in self._samples if (kept := self._after(name, after_s))}

    def megabytes(self, name: str, after_s: float = 0.0) -> list[float]:
        return [round(one / 2**20, 1) for one in self._after(name, after_s)]

    def _after(self, name: str, after_s: float) -> list[int]:
        return [num_bytes for time_s, num_bytes in self._samples[name] if time_s >= after_s]


class QueueWatch(Watch):
    """How many requests wait, as the fleet itself counts them."""

    def __init__(self, address: str, every_s: float = 0.05) -> None:
        self._client = Client(address)
        self.num_queued: list[int] = []
        super().__init__(every_s)

    def look(self, time_s: float) -> None:
        self.num_queued.append(self._client.fleet().num_queued_requests)

    def stop(self) -> None:
        super().stop()
        self._client.close()


def _held(fleet: control_pb2.Fleet) -> list[str]:
    counts = {"queued": fleet.num_queued_requests, "live": fleet.num_live_requests}
    for replica in fleet.replicas:
        stats = replica.stats
        counts |= {"dispatched": replica.num_live_requests, "running": stats.num_running}
        counts |= {"waiting": stats.num_waiting, "pages": stats.num_used_pages}
    return [f"{count} {what}" for what, count in counts.items() if count]
