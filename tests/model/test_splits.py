"""The lists of attention's tasks: every token once, cut at the same places whoever shares the step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.model.kernels.splits import SPLIT, TILE, decode_splits, max_splits, prefill_tiles

LENGTHS = st.lists(st.integers(0, 5 * SPLIT), max_size=12)


@given(lengths=LENGTHS)
def test_the_splits_of_a_row_cover_its_context_and_stand_in_order(lengths: list[int]) -> None:
    splits, starts = decode_splits(np.array(lengths, dtype=np.int64))
    assert splits.dtype == starts.dtype == np.int32
    assert (starts[0], starts[-1]) == (0, len(splits))
    for row, length in enumerate(lengths):
        own = splits[starts[row] : starts[row + 1]]
        assert own.tolist() == [[row, index] for index in range(-(-length // SPLIT))]


@given(
    counts=st.lists(st.integers(2, 5 * TILE), max_size=8), num_decodes=st.integers(0, 5)
)  # fmt: skip
def test_the_tiles_of_a_prompt_cover_its_tokens(counts: list[int], num_decodes: int) -> None:
    tiles = prefill_tiles(np.array([1] * num_decodes + counts, dtype=np.int64), num_decodes)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == [
        [num_decodes + row, first] for row, count in enumerate(counts) for first in range(0, count, TILE)
    ]


@given(lengths=LENGTHS, spare_rows=st.integers(0, 3), spare_tokens=st.integers(0, 1000))
def test_no_step_has_more_splits_than_there_is_room_for(lengths: list[int], spare_rows: int, spare_tokens: int) -> None:
    splits, _ = decode_splits(np.array(lengths, dtype=np.int64))
    bound = max_splits(len(lengths) + spare_rows, max(lengths, default=0), sum(lengths) + spare_tokens)
    assert len(splits) <= bound
    assert max_splits(4, SPLIT + 1, 4 * SPLIT + 4) == 8
    assert max_splits(1, 100 * SPLIT, 3 * SPLIT) == 4
