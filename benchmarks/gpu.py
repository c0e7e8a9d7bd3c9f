"""``python -m benchmarks gpu``: what one GPU reaches, in ten minutes, held against what the same GPU can do.

Parts run one after the other, each in a process of its own with a limit on its time; what a part has told before it was
ended counts.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.emitting import Record
from benchmarks.gpu_parts import PARTS, GpuSetup

_REPOSITORY = Path(__file__).parent.parent
LIMITS_S = {"peaks": 60.0, "decode": 180.0, "load": 90.0, "prefill": 90.0, "mixed": 180.0}
_BOUNDED = [name for name in LIMITS_S if name != "peaks"]


@dataclass(frozen=True)
class Target:
    """The figure ``metric`` of the records that have all of ``where``."""

    what: str
    where: tuple[tuple[str, object], ...]
    metric: str
    limit: float
    at_most: bool = False

    def values(self, records: Sequence[Record]) -> list[float]:
        mine = [one for one in records if all(one.get(key) == value for key, value in self.where)]
        return [one[self.metric] for one in mine if self.metric in one]

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def _decode(model: str, limit: float) -> Target:
    where = (("part", "decode"), ("model", model), ("batch", 1))
    return Target(f"decode, {model}, batch 1: share of the copy bandwidth", where, "share_of_bandwidth", limit)


TARGETS = (
    _decode("8B", 0.85),
    _decode("1B", 0.78),
    _decode("135M", 0.35),
    Target("device idle between decode steps", (("part", "decode"),), "device_idle", 0.02, at_most=True),
    Target("load, 8B, s", (("part", "load"), ("model", "8B")), "load_s", 6.0, at_most=True),
    Target("decode steps recorded, 8B, s", (("part", "load"), ("model", "8B")), "record_s", 5.0, at_most=True),
)


def measure(setup: GpuSetup, names: Sequence[str] = ()) -> Iterator[Record]:
    """Of the parts of these names, or all; peaks are measured first, for the others are shares of them.

    Raises ValueError for a name that is none.
    """
    if unknown := sorted(set(names) - set(PARTS)):
        raise ValueError(f"--part: unknown {unknown[0]!r}; known: {', '.join(PARTS)}")
    for record in _run_part("peaks", setup):
        yield record
        setup = msgspec.structs.replace(setup, bytes_per_s=record["bytes_per_s"], flops_per_s=record["flops_per_s"])
    if not setup.bytes_per_s:
        raise ValueError("the peaks of the device could not be measured; its message is above")
    for name in _BOUNDED:
        if not names or name in names:
            yield from _run_part(name, setup)


def _run_part(name: str, setup: GpuSetup) -> Iterator[Record]:
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, msgspec.json.encode(setup).decode()]
    process = subprocess.Popen(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ended = threading.Timer(LIMITS_S[name], process.kill)
    ended.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield msgspec.json.decode(line)
        if code := process.wait():
            why = f"was ended after {LIMITS_S[name]:g} s" if code < 0 else f"ended with code {code}"
            print(f"gpu: {name} {why}", file=sys.stderr)
    finally:
        ended.cancel()
        process.kill()
        process.wait()


def to_table(records: Sequence[Record]) -> str:
    """What was measured, and the targets, as Markdown."""
    lines = ["| part | what | figures |", "| --- | --- | --- |"]
    lines += [f"| {one['part']} | {_subject(one)} | {_figures(one)} |" for one in records]
    lines += ["", "| target | reached | of |", "| --- | --- | --- |"]
    for target in TARGETS:
        values = target.values(records)
        worst = (max if target.at_most else min)(values) if values else None
        reached = "" if worst is None else f"{worst:.3g}" if target.is_met(worst) else f"**{worst:.3g}**"
        lines.append(f"| {target.what} | {reached} | {'≤' if target.at_most else '≥'} {target.limit:g} |")
    return "\n".join(lines)


_SUBJECTS = ("device", "contestant", "model", "batch", "prompt_len")
_FIGURES = (
    "bytes_per_s", "flops_per_s", "step_ms", "device_ms", "tokens_per_s", "share_of_bandwidth", "device_idle", "ms",
    "share_of_peak", "load_s", "record_s", "seconds",
)  # fmt: skip


def _subject(record: Record) -> str:
    return ", ".join(f"{key} {record[key]}" for key in _SUBJECTS if key in record)


def _figures(record: Record) -> str:
    return ", ".join(f"{key} {record[key]:.3g}" for key in _FIGURES if key in record)
