"""``python -m benchmarks gpu``: the script that a person with a GPU runs, here with tiny shapes on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import folder_of
from benchmarks.gpu_parts import TINY
from benchmarks.gpu_peers import continuous_manager, serve_continuously

ROOT = Path(__file__).resolve().parent.parent


def test_every_part_tells_its_figures_and_the_table_has_the_targets(tmp_path: Path) -> None:
    output = tmp_path / "found.jsonl"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--tiny", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["part"] for record in records[:4]] == ["peaks", "decode", "decode", "load"]
    assert {record["part"] for record in records} == set(gpu.LIMITS_S)
    assert [one["contestant"] for one in records if one["part"] == "mixed"] == [
        "shardray", "transformers, continuous", "transformers, static",
    ]  # fmt: skip
    for record in records:
        assert all(value > 0 for key, value in record.items() if key.endswith(("_ms", "_per_s", "_of_peak")))
    for target in gpu.TARGETS:
        assert target.what in done.stderr


def test_continuous_batches_of_transformers_end_each_request_at_its_own_length(tmp_path: Path) -> None:
    requests = [([5, 6, 7], 3), ([8] * 40, 17), ([9], 1)]
    with continuous_manager(folder_of("tiny", tmp_path), torch.device("cpu"), requests) as manager:
        assert serve_continuously(manager, requests) == [3, 17, 1]
        assert serve_continuously(manager, requests[:1]) == [3]


def test_an_unknown_part_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--part: unknown 'speed'; known: peaks, decode"):
        list(gpu.measure(TINY, ["speed"]))


def test_a_part_is_ended_in_time_and_what_it_told_before_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.LIMITS_S, "decode", 12.0)
    endless = msgspec.structs.replace(TINY, batches=(1,) * 5000)
    parts = [record["part"] for record in gpu.measure(endless, ["decode"])]
    assert parts[:2] == ["peaks", "decode"]
    assert len(parts) < 5000
    assert "gpu: decode was ended after 12 s" in capsys.readouterr().err


def test_a_target_is_held_against_the_worst_figure() -> None:
    records = [
        {"part": "decode", "model": "8B", "batch": 1, "share_of_bandwidth": 0.9, "device_idle": 0.01},
        {"part": "decode", "model": "8B", "batch": 32, "share_of_bandwidth": 0.5, "device_idle": 0.04},
    ]
    table = gpu.to_table(records)
    assert "| decode, 8B, batch 1: share of the copy bandwidth | 0.9 | ≥ 0.85 |" in table
    assert "| device idle between decode steps | **0.04** | ≤ 0.02 |" in table
