"""The table of the front door's benchmark, and a short run of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.front_door import TARGETS, Figure, to_table

REPOSITORY = Path(__file__).parents[1]


def test_the_table_marks_what_misses_its_target() -> None:
    missed, met = Figure("refusals at overload: p99, ms", 12.3), Figure("1000 idle streams: share of a core, %", 1.0)
    lines = to_table([missed, met, Figure("something else", 5.0)]).splitlines()
    assert lines[2:] == [
        "| refusals at overload: p99, ms | **12.3** | 10 |",
        "| 1000 idle streams: share of a core, % | 1.0 | 2 |",
        "| something else | 5.0 |  |",
    ]


@pytest.mark.slow
@pytest.mark.integration
def test_every_figure_that_has_a_target_is_measured(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "front-door",
        "--seconds",
        "1",
        "--output",
        str(tmp_path / "out.jsonl"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["what"] for record in records if record["target"] is not None} == set(TARGETS)
    assert all(record["value"] >= 0 for record in records)
