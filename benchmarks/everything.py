"""All that docs/performance.md is made from, one part after the other, into one file."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# In this order: what the targets ask for comes first.
PARTS: dict[str, tuple[str, ...]] = {
    "targets": ("run", "--suite", "targets"),
    "fleet": ("fleet",),
    "growth": ("run", "--suite", "growth", "--no-judge"),
    "arrivals": ("run", "--suite", "arrivals", "--no-judge"),
    "driver": ("driver",),
    "starts": ("starts",),
}


def run_parts(names: Sequence[str], target: Path) -> bool:
    """Appends to ``target``; whether every part succeeded. Raises ValueError for a part that is not known."""
    if unknown := sorted(set(names) - set(PARTS)):
        raise ValueError(f"--part {unknown[0]!r} is unknown; known: {', '.join(PARTS)}")
    succeeded = True
    for name in names or PARTS:
        began_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", *PARTS[name], "--output", str(target)],
            cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        succeeded = succeeded and done.returncode == 0
        print(f"{name}: {time.monotonic() - began_s:.0f} s, code {done.returncode}", file=sys.stderr, flush=True)
    return succeeded
