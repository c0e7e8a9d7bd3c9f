"""The benchmarks of recovery and scaling on a tiny random model, and their tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.recovery import Recovery, to_table
from benchmarks.scaling import ScalePause
from benchmarks.scaling import to_table as scaling_table
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


@pytest.mark.slow
@pytest.mark.integration
def test_a_stream_is_timed_while_the_counts_change_under_it(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=4096)
    command = [sys.executable, "-m", "benchmarks", "scaling", "--model", str(folder), "--dtype", "float32"]
    command += ["--shapes", "1x1,2x1", "--output", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (record["before"], record["after"]) == ("1 x 1", "2 x 1")
    assert 0 < record["gap_s"] <= record["pause_s"] < record["operation_s"]
    assert "| 1 x 1 | 2 x 1 |" in done.stderr


def test_a_shape_that_is_none_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "scaling", "--shapes", "1x1,2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --shapes: '2' is no shape; write tensor x pipeline, like 2x1\n"


def test_the_table_of_pauses_holds_the_worst_against_the_target() -> None:
    pauses = [ScalePause("1 x 1", "2 x 1", 5.0, pause_s, 0.02) for pause_s in (0.4, 1.2)]
    assert scaling_table(pauses[:1]).endswith("below 1 s; met.")
    assert scaling_table(pauses).endswith("below 1 s; missed.")
