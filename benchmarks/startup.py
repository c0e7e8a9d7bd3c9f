"""From the start of a process to its first token, against the size of the model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kinds import PEERS_DIR, parse_label
from benchmarks.machine import BUSY_CORES, OthersMeter, wait_until_quiet
from benchmarks.protocol import Request, Setup
from benchmarks.worker import start_worker
from shardray.runtime.model.random_model import write_model

Record = dict[str, Any]
SIZES: dict[str, dict[str, Any]] = {
    "60M": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 32768},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 49152},
    "1.2B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
LABELS = ("shardray", "served")
_FIRST = Request(list(range(10, 138)), 1)
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class StartupSetup:
    """What is measured: every size by every contestant, ``num_rounds`` times in turn."""

    sizes: tuple[str, ...]
    num_rounds: int
    num_threads: int
    quiet_timeout_s: float
    log_dir: Path


def measure(setup: StartupSetup) -> Iterator[Record]:
    """One result a start. Weights are in the page cache: each model is read once before."""
    folders = {size: write_model(PEERS_DIR / "models" / f"random-{size}", SIZES[size]) for size in setup.sizes}
    for number in range(setup.num_rounds):
        for size, folder in folders.items():
            weight_bytes = _read_through(folder)
            for label in LABELS:
                started = {"kind": "startup", "round": number, "contestant": label, "size": size}
                yield started | {"weight_bytes": weight_bytes} | _start(setup, label, folder)


def _start(setup: StartupSetup, label: str, folder: Path) -> Record:
    contestant = parse_label(label)
    python = contestant.kind.python()
    assert python is not None
    wait_until_quiet(setup.quiet_timeout_s)
    meter = OthersMeter()
    with start_worker(contestant, python, setup.log_dir / f"start-{label}.log", _TIMEOUT_S) as worker:
        ready = worker.load(Setup(str(folder), "bfloat16", setup.num_threads, worker.spawned_s, _FIRST))
        return {"startup_s": ready.startup_s, "busy": meter.cores() > BUSY_CORES}


def _read_through(folder: Path) -> int:
    """Bytes of the weights; then they are in the page cache."""
    num_bytes = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                num_bytes += len(chunk)
    return num_bytes


def to_table(records: list[Record]) -> str:
    """Markdown: the median of the rounds."""
    lines = ["| model | weights, MiB | in process, s | served, s |", "| --- |" + " ---: |" * 3]
    for size in dict.fromkeys(one["size"] for one in records):
        own = [one for one in records if one["size"] == size]
        times = [[one["startup_s"] for one in own if one["contestant"] == label] for label in LABELS]
        cells = [f"{statistics.median(values):.1f}" if values else "–" for values in times]
        lines.append(f"| {size} | {own[0]['weight_bytes'] / 2**20:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)
