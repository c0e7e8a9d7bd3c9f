"""Ref-counted pages: nothing is handed out twice, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.engine.pages import OutOfPagesError, PagePool


def test_pages_handed_out_are_distinct_and_counted() -> None:
    pool = PagePool(num_pages=8, block_size=4)
    pages = pool.allocate(3) + pool.allocate(5)
    assert sorted(pages) == list(range(8))
    assert (pool.num_free, pool.num_used) == (0, 8)


def test_a_request_for_more_pages_than_are_free_takes_none() -> None:
    pool = PagePool(num_pages=4, block_size=4)
    pool.allocate(2)
    with pytest.raises(OutOfPagesError, match="3 pages asked for, 2 of 4 are free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_shared_page_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = PagePool(num_pages=1, block_size=4)
    (page,) = pool.allocate(1)
    pool.retain(page)
    pool.release(page)
    assert pool.num_free == 0
    pool.release(page)
    assert pool.num_free == 1


def test_a_free_page_can_be_neither_retained_nor_released() -> None:
    pool = PagePool(num_pages=2, block_size=4)
    (page,) = pool.allocate(1)
    pool.release(page)
    with pytest.raises(ValueError, match=f"page {page} is free"):
        pool.release(page)
    with pytest.raises(ValueError, match=f"page {page} is free"):
        pool.retain(page)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_tokens_take_whole_pages(num_tokens: int, num_pages: int) -> None:
    assert PagePool(num_pages=8, block_size=4).pages_for(num_tokens) == num_pages


def test_a_page_that_nobody_holds_and_one_with_an_uncounted_holder_are_noticed() -> None:
    pool = PagePool(num_pages=4, block_size=4)
    first, second = pool.allocate(2)
    pool.check_integrity([first, second])
    with pytest.raises(RuntimeError, match=f"page {second} has 0 holders but is counted as having 1"):
        pool.check_integrity([first])
    with pytest.raises(RuntimeError, match=f"page {first} has 2 holders but is counted as having 1"):
        pool.check_integrity([first, first, second])


@given(
    num_pages=st.integers(0, 12),
    actions=st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(0, 30))),
)
def test_free_and_used_pages_always_add_up(num_pages: int, actions: list[tuple[str, int]]) -> None:
    pool, held = PagePool(num_pages, block_size=4), list[int]()
    for action, number in actions:
        if action == "take" and number <= pool.num_free:
            pages = pool.allocate(number)
            assert not set(pages) & set(held)
            held += pages
        elif action == "share" and held:
            held.append(held[number % len(held)])
            pool.retain(held[-1])
        elif action == "drop" and held:
            pool.release(held.pop(number % len(held)))
        assert pool.num_used == len(set(held))
        pool.check_integrity(held)
