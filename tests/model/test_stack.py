"""Decode steps as recorded programs: the same logits, to the bit, as the layers give one by one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.model.logits import NUM_SLOTS, LogitsOf
from tests.tiny_models import save_gpt2, save_llama

NUM_STEPS = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return save_llama(tmp_path_factory.mktemp("llama"), **sizes)


def some_steps(seed: int) -> list[dict[int, list[int]]]:
    """Prompts first, then decodes of ever changing slots."""
    chance = random.Random(seed)
    steps = [{slot: [chance.randrange(90) for _ in range(3 + slot)] for slot in range(NUM_SLOTS)}]
    for _ in range(NUM_STEPS):
        slots = sorted(chance.sample(range(NUM_SLOTS), chance.randint(1, NUM_SLOTS)))
        steps.append({slot: [chance.randrange(90)] for slot in slots})
    return steps


def recordings(model: LogitsOf) -> int:
    return 0 if model.programs is None else len(model.programs._programs)


def test_recorded_steps_give_the_logits_of_unrecorded_ones_to_the_bit(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some processors multiply faster by torch, whose products cannot be recorded; this one runs on all.
    monkeypatch.setattr("shardray.parallel.layers._kernel_variant", lambda: "halves")
    with LogitsOf(llama, "bfloat16") as recorded, LogitsOf(llama, "bfloat16") as plain:
        plain.record_nothing()
        for rows in some_steps(1):
            expected, found = plain.step(rows), recorded.step(rows)
            for slot in rows:
                assert torch.equal(found[slot], expected[slot])
        assert recordings(recorded) == NUM_SLOTS
        assert recordings(plain) == 0


def test_layers_in_which_torch_computes_run_one_by_one(tmp_path: Path) -> None:
    with LogitsOf(save_gpt2(tmp_path), "bfloat16") as model:
        for rows in some_steps(2):
            for logits in model.step(rows).values():
                assert torch.isfinite(logits).all()
        assert recordings(model) == 0
