"""Every family against ``transformers``: the logits of prefills in chunks and of decodes, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.logits import LogitsOf
from tests.model.test_families import distance, random_ids
from tests.model.zoo import ZOO, save
from tests.tiny_models import Reference

NUM_DECODES = 24
TOLERANCE = 2e-4  # of the largest logit


@pytest.mark.parametrize("name", ZOO)
def test_a_family_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    reference = Reference(folder)
    lens = [29, 17]
    sequences = [[i % 97 for i in random_ids(count + NUM_DECODES, seed)] for seed, count in enumerate(lens)]
    found: list[list[torch.Tensor]] = [[], []]
    with LogitsOf(folder) as model:
        feeds = [[13, lens[0] - 13, *[1] * NUM_DECODES], [lens[1] - 1, 1, *[1] * NUM_DECODES]]
        starts = [0, 0]
        for counts in zip(*feeds, strict=True):
            rows = {slot: sequences[slot][starts[slot] : starts[slot] + count] for slot, count in enumerate(counts)}
            for slot, part in model.step(rows).items():
                found[slot].append(part)
                starts[slot] += len(rows[slot])
    for ids, parts in zip(sequences, found, strict=True):
        assert distance(torch.cat(parts), reference.logits(ids)) < TOLERANCE
