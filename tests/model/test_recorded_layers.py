"""Layers run as recorded programs on CPUs: a recording serves whatever rows a step of its size has, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardray.runtime.engine import programs
from shardray.runtime.engine.programs import StepPrograms
from tests.model.logits import LogitsOf
from tests.tiny_models import save_llama

# Steps of 12 tokens, then of 3, by slot; prompts alone, prompts beside decodes, decodes alone, each several times.
SIZES: list[dict[int, int]] = [
    {0: 12}, {1: 5, 2: 7}, {0: 3, 1: 9}, {2: 2, 0: 6, 1: 4},
    {0: 1, 3: 11}, {0: 1, 1: 1, 2: 1, 3: 9}, {1: 1, 2: 4, 3: 7}, {0: 1, 1: 1, 2: 10}, {3: 1, 0: 11},
    {0: 1, 1: 1, 2: 1}, {1: 1, 2: 1, 3: 1}, {0: 1, 2: 1, 3: 1}, {0: 1, 1: 2}, {2: 2, 3: 1}, {1: 1, 0: 2},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_llama(tmp_path, hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=16)


def run_steps(logits_of: LogitsOf) -> list[dict[int, torch.Tensor]]:
    found = []
    for number, sizes in enumerate(SIZES):
        rows = {slot: [(7 * number + 5 * slot + i) % 90 + 3 for i in range(count)] for slot, count in sizes.items()}
        found.append(logits_of.step(rows))
    return found


def check_equal(folder: Path, dtype: str) -> StepPrograms:
    """Gives what was recorded."""
    with LogitsOf(folder, dtype) as recording, LogitsOf(folder, dtype) as other:
        other.record_nothing()
        for found, expected in zip(run_steps(recording), run_steps(other), strict=True):
            assert found.keys() == expected.keys()
            for slot, logits in found.items():
                assert torch.equal(logits, expected[slot])
        assert recording.programs is not None
        return recording.programs


def test_a_recording_serves_any_rows_of_as_many_tokens(folder: Path) -> None:
    found = check_equal(folder, "bfloat16")._programs
    kinds = {(12, False, True), (12, True, True), (3, True, False), (3, True, True)}
    assert {(kind.num_tokens, kind.has_decodes, kind.has_prompts) for kind in found} == kinds


def test_layers_in_which_torch_computes_are_not_recorded(folder: Path) -> None:
    found = check_equal(folder, "float32")
    assert found._recorder is None
    assert not found._programs


def test_the_recording_that_was_not_used_for_longest_gives_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_MOST_PROGRAMS", 2)
    kept = check_equal(folder, "bfloat16")._programs
    assert [kind.num_tokens for kind in kept] == [3, 3]


def test_long_steps_with_prompts_run_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_MOST_TOKENS", 11)
    seen = check_equal(folder, "bfloat16")._seen
    assert {kind.num_tokens for kind in seen} == {3}
