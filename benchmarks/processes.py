"""CPU time and memory of a process and all its descendants, out of /proc. Standard library only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal


def process_tree(root_pid: int) -> list[int]:
    """``root_pid`` and everything it started that still runs, in no particular order."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat_fields(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree, found = [], [root_pid]
    while found:
        pid = found.pop()
        tree.append(pid)
        found += children.get(pid, [])
    return tree


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of ``pids`` so far, with that of their children that have ended."""
    return sum(_TICK_S * sum(map(int, fields[11:15])) for pid in pids if (fields := _stat_fields(pid)))


def name_of(pid: int) -> str:
    """As the kernel has it: 15 letters, Ray's actors by their class. Raises OSError if the process has ended."""
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()


def forget_peaks(pids: list[int]) -> None:
    """From here on ``peak_rss_bytes`` is of what comes: a process serves one workload after the other."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # proc_pid_clear_refs(5)


def peak_rss_bytes(pids: list[int]) -> int:
    """The sum of each process's own peak since ``forget_peaks``."""
    return sum(_kib(f"/proc/{pid}/status", "VmHWM:") for pid in pids) * 1024


def pss_bytes(pids: list[int]) -> int:
    """Resident memory now, each page shared out among the processes that map it."""
    return sum(_kib(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids) * 1024


def machine_cpu_seconds() -> float:
    """Time that the machine's CPUs were not idle so far, time stolen by other guests of its host included."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    return sum(_TICK_S * int(fields[index]) for index in _BUSY_FIELDS)


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/pid/stat from the state on; empty if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _kib(path: str, key: str) -> int:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)
