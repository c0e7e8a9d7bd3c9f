"""Rows of tables and their best columns: the compiled kernels give what torch gives."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardray.parallel import rows


def with_torch(call: Callable[[], Tensor]) -> Tensor:
    with mock.patch.object(rows, "_kernels", return_value=None):
        return call()


def check_same(call: Callable[[], Tensor]) -> Tensor:
    found, expected = call(), with_torch(call)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)
    return found


def test_compiled_kernels_are_what_is_tested_here() -> None:
    assert rows._kernels(torch.device("cpu")) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 33), (4,), (0, 3)])
def test_rows_of_others_are_zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    table = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    index = torch.tensor([11, 10, 9, 16, 17, 0, 13, 10])
    taken = check_same(lambda: rows.take_rows(table, index, first=10))
    for row, number in zip(taken, index.tolist(), strict=True):
        assert torch.equal(row, table[number - 10] if number - 10 in range(len(table)) else torch.zeros_like(row))
    assert rows.take_rows(table, index[:0], first=10).shape == (0, *shape[1:])


def test_rows_of_a_table_that_is_not_contiguous() -> None:
    table = torch.arange(40.0).view(5, 8)[:, 1:4]
    assert torch.equal(rows.take_rows(table, torch.tensor([4, 0])), table[[4, 0]])
    assert torch.equal(rows.take_rows(table, torch.tensor([9, 4]), first=5), torch.stack((table[4], torch.zeros(3))))


def test_rows_of_a_whole_table() -> None:
    table = torch.arange(40.0).view(5, 8)
    assert torch.equal(check_same(lambda: rows.take_rows(table, torch.tensor([4, 0]))), table[[4, 0]])


def test_what_is_missing_comes_from_the_table_that_words_were_put_into() -> None:
    table = torch.arange(6)
    rows.put_words(table, torch.tensor([5, 1]), torch.tensor([70, 80]))
    assert table.tolist() == [0, 80, 2, 3, 4, 70]
    values, index = torch.tensor([-1, 9, -1, 0]), torch.tensor([1, 2, 5, 0])
    assert check_same(lambda: rows.fill_in(values, -1, table, index)).tolist() == [80, 9, 70, 0]


def test_a_score_that_is_not_finite_leaves_no_column() -> None:
    block = torch.tensor([[1.0, 2.0, torch.nan, 0.0], [torch.nan] * 4, [3.0, torch.inf, 5.0, 6.0], [-torch.inf] * 4])
    block[0, 2] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # as x86 makes them, below zero
    assert torch.isnan(block[0, 2])
    assert check_same(lambda: rows.best_column(block)).tolist() == [rows.NOT_FINITE] * 3 + [0]
    pairs = torch.stack([rows.best_columns(block[:, :2], 0), rows.best_columns(block[:, 2:], 2)])
    assert check_same(lambda: rows.pick_best(pairs)).tolist() == [rows.NOT_FINITE] * 3 + [0]
    table = torch.full((4,), 9)
    rows.put_words(table, torch.arange(4), rows.best_column(block))
    assert table.tolist() == [0, 0, 0, 0]


scores = st.sampled_from([-torch.inf, -3.5, -0.0, 0.0, 2.0**-140, 2.25, 2.0**127, torch.inf])


@given(st.lists(st.lists(scores, min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 9))
def test_the_first_of_the_highest_is_found(values: list[list[float]], first: int) -> None:
    found = rows.best_columns(torch.tensor(values), first)
    for row, (score, column) in zip(values, found.tolist(), strict=True):
        assert score == max(row)
        assert column == first + row.index(max(row))


@pytest.mark.parametrize("num_columns", [1, 15, 1024, 1025, 4000])
def test_rows_of_many_columns(num_columns: int) -> None:
    block = torch.randn(9, num_columns, generator=torch.Generator().manual_seed(num_columns))
    block[3, num_columns // 2 :] = block[3].max() + 1
    block[4] = -torch.inf
    check_same(lambda: rows.best_columns(block, 100))
    found = rows.best_columns(block, 100)
    assert found[3, 1] == 100 + num_columns // 2
    assert found[4].tolist() == [-torch.inf, 100.0]


@pytest.mark.parametrize("widths", [(3, 4, 2), (0, 5, 0), (9,), (1, 0)])
def test_the_best_of_all_ranks_is_the_best_of_the_whole(widths: tuple[int, ...]) -> None:
    whole = torch.randint(-3, 3, (40, sum(widths)), generator=torch.Generator().manual_seed(1)).float()
    starts = [sum(widths[:rank]) for rank in range(len(widths))]

    def best() -> Tensor:
        blocks = whole.split(list(widths), dim=1)
        pairs = [rows.best_columns(block, start) for block, start in zip(blocks, starts, strict=True)]
        return rows.pick_best(torch.stack(pairs))

    assert check_same(best).tolist() == whole.numpy().argmax(axis=1).tolist()
    assert check_same(lambda: rows.best_column(whole)).tolist() == whole.numpy().argmax(axis=1).tolist()
