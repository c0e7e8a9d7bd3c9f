"""Every family computes the same from weights that another process loaded: nothing reads what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardray.parallel.layers import can_share
from tests.model.encoder_zoo import PAIRS, save_encoder
from tests.model.logits import LogitsOf
from tests.model.zoo import ZOO, save

IDS = (3, 4, 5, 6, 7, 8, 9, 10, 11)
DTYPES = [name for name in ("float32", "bfloat16") if can_share("cpu", getattr(torch, name))]


def logits(model: LogitsOf, is_pair: bool) -> list[Tensor]:
    """Of a prompt and of a decode."""
    prompts = {0: IDS} if is_pair else None
    return [model.step({0: IDS[:5]}, prompts)[0], model.step({0: IDS[5:6]})[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ZOO, *PAIRS])
def test_shared_weights_give_the_same_logits_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    folder = (save if name in ZOO else save_encoder)(name, tmp_path)
    is_pair = name in PAIRS
    with LogitsOf(folder, dtype) as own:
        expected = logits(own, is_pair)
    with LogitsOf(folder, dtype, share_weights=True) as first, LogitsOf(folder, dtype, share_weights=True) as second:
        assert first.num_borrowed_bytes == 0
        assert second.num_borrowed_bytes > 0
        for model in (first, second):
            assert all(map(torch.equal, logits(model, is_pair), expected))
