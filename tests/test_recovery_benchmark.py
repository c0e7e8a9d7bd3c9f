"""The recovery benchmark on a tiny random model, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.recovery import Recovery, to_table
from tests.tiny_models import save_llama

REPOSITORY = Path(__file__).parents[1]
PARTS = ("detect_s", "fence_s", "hosts_s", "form_s", "load_s", "attach_s", "replay_s")


@pytest.mark.integration
def test_killed_hosts_are_timed_from_the_kill_to_the_next_token(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=4096)
    command = [sys.executable, "-m", "benchmarks", "recovery", "--model", str(folder), "--dtype", "float32"]
    command += ["--spares", "0", "--rounds", "2", "--peace", "1", "--output", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["victim"] for record in records] == ["rank 1", "leader"]
    for record in records:
        assert sum(record[part] for part in PARTS) == pytest.approx(record["total_s"])
        assert all(record[part] > -0.05 for part in PARTS), "no part is counted twice"
        assert record["hosts_s"] > 0.1, "a new process was started"
    assert "| 2 leader |" in done.stderr


def test_the_table_has_each_kill_the_median_the_worst_and_the_target() -> None:
    kills = [Recovery("leader", 0.1, 0.1, 0.0, 0.1, total - 0.5, 0.1, 0.1, total) for total in (1.0, 1.2, 3.0)]
    lines = to_table(kills, num_spares=1).splitlines()
    assert lines[2].split(" | ")[0] == "| 1 leader"
    assert [line.split(" | ")[-1] for line in lines[5:7]] == ["1.20 |", "3.00 |"]
    assert lines[-1] == "Seconds. Target: below 1.5 s with 1 spare, median; met."
