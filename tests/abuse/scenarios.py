"""What is done to the fleet, and the figures of it."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from tests.abuse.fleet import MAX_NUM_SEQS, AbusedFleet, MemoryWatch, QueueWatch
from tests.abuse.worker import Worker

Figures = dict[str, Any]
_BEFORE_S = 3.0  # of the healthy client's pace without anything else
_SHARE_KILLED = 5  # one of so many clients vanishes by kill -9 of its process
_KILLED_AT_ONCE = 20


def overload(fleet: AbusedFleet, seconds: float, settled_s: float = 10.0) -> Figures:
    """Four times the capacity; memory counts from ``settled_s`` on."""
    clients = Worker("load", fleet.address, seconds=seconds, num_clients=12, max_tokens=64)
    clients.hear()  # the capacity has been measured, everything is warm
    memory, queue = MemoryWatch(fleet.processes()), QueueWatch(fleet.address)
    figures = clients.result()
    memory.stop()
    queue.stop()
    grown = {name: round(100 * share, 2) for name, share in memory.growth(settled_s).items()}
    sizes = {name: memory.megabytes(name, settled_s) for name in grown}
    late_s = {where: [round(f(ones), 3) for f in (median, max)] for where, ones in figures["deadlines"].items() if ones}
    return {
        **figures,
        "most_queued": max(queue.num_queued),
        "deadlines": late_s,
        "memory_growth_percent": grown,
        "memory_mb": {name: [series[0], series[-1]] for name, series in sizes.items()},
        "left": fleet.left(),
    }


def vanishing(fleet: AbusedFleet, num_clients: int) -> Figures:
    """Clients that go without a word, in every way."""
    num_files = fleet.driver.num_fds()
    num_killed = num_clients // _SHARE_KILLED
    leaving = Worker("vanish", fleet.address, num_clients=num_clients - num_killed)
    ways: dict[str, int] = leaving.result()
    num_streaming = 0
    for _ in range(0, num_killed, _KILLED_AT_ONCE):
        staying = Worker("vanish", fleet.address, num_clients=_KILLED_AT_ONCE, stay=True)
        num_streaming += staying.hear()["streaming"]
        staying.kill()
    ways["kill -9, streaming"] = num_streaming
    ways["kill -9, waiting or refused"] = num_killed - num_streaming
    return {"ways": ways, "left": fleet.left(), "files_left": _files_left(fleet, num_files)}


def slow_readers(fleet: AbusedFleet, num_clients: int = MAX_NUM_SEQS // 2, seconds: float = 8.0) -> Figures:
    """Clients that ask for everything there is and do not read."""
    healthy = _healthy(fleet)
    before_mb = _driver_mb(fleet)
    slow = Worker("slow", fleet.address, num_clients=num_clients, max_tokens=400, timeout_s=seconds)
    slow.hear()
    healthy.say("while")
    memory = MemoryWatch({"driver": fleet.driver}, every_s=0.2)
    time.sleep(seconds)
    pace = healthy.result()
    memory.stop()
    slow.say("read on")
    read_on = slow.hear()
    figures = slow.result()
    return {
        "pace": pace,
        "driver_mb_per_slow_reader": round((max(memory.megabytes("driver")) - before_mb) / num_clients, 2),
        **read_on,
        **figures,
        "left": fleet.left(),
    }


def idle_connections(fleet: AbusedFleet, num_connections: int, seconds: float = 4.0) -> Figures:
    """Connections that say nothing, and a client that is served beside them."""
    num_files = fleet.driver.num_fds()
    healthy = _healthy(fleet)
    before_mb, began_s = _driver_mb(fleet), time.monotonic()
    idle = Worker("idle", fleet.address, num_connections=num_connections)
    num_open = idle.hear()["open"]
    opened_s = time.monotonic() - began_s
    healthy.say("while")
    time.sleep(seconds)
    pace = healthy.result()
    held_kb = 1024 * (_driver_mb(fleet) - before_mb) / num_open
    return {
        "open": num_open,
        "opened_in_s": round(opened_s, 1),
        "driver_kb_per_connection": round(held_kb, 1),
        "pace": pace,
        **idle.result(),
        "files_left": _files_left(fleet, num_files),
    }


def garbage(fleet: AbusedFleet, seconds: float) -> Figures:
    """All that no client library sends, beside a client that is served."""
    num_files = fleet.driver.num_fds()
    healthy = _healthy(fleet)
    attackers = Worker("wire", fleet.address)
    healthy.say("while")
    memory = MemoryWatch(fleet.processes())
    time.sleep(seconds)
    pace = healthy.result()
    memory.stop()
    figures = attackers.result()
    return {
        "pace": pace,
        **figures,
        "memory_growth_percent": {name: round(100 * share, 2) for name, share in memory.growth(seconds / 2).items()},
        "left": fleet.left(),
        "files_left": _files_left(fleet, num_files),
    }


def _healthy(fleet: AbusedFleet) -> Worker:
    client = Worker("healthy", fleet.address)
    client.hear()  # it has been served
    client.say("before")
    time.sleep(_BEFORE_S)
    return client


def _driver_mb(fleet: AbusedFleet) -> float:
    return float(fleet.driver.memory_info().rss / 2**20)


def _files_left(fleet: AbusedFleet, num_before: int, timeout_s: float = 10.0) -> int:
    """Files, connections among them, that the driver has open beyond those it had."""
    deadline = time.monotonic() + timeout_s
    while (num_left := fleet.driver.num_fds() - num_before) > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    return num_left
