"""Where records go: JSON lines on stdout and in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Emit = Callable[[Record], None]
RESULTS_DIR = Path(__file__).parent / "results"


def new_run_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def emitter(target: Path, common: Record) -> Emit:
    """Appends to ``target``; each record begins with ``common`` and the time."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def emit(record: Record) -> None:
        line = json.dumps(common | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | record)
        print(line, flush=True)
        with target.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return emit
