"""Waiting requests leave in order of priority, then of arrival."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.driver.queue import WaitingQueue


def drain(queue: WaitingQueue) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


@given(priorities=st.lists(st.integers(-3, 3), max_size=200), data=st.data())
def test_order_is_priority_then_arrival_whatever_was_removed_in_between(
    priorities: list[int], data: st.DataObject
) -> None:
    queue = WaitingQueue()
    for number, priority in enumerate(priorities):
        queue.push(str(number), priority, number)
    removed = data.draw(st.sets(st.sampled_from(range(len(priorities))))) if priorities else set()
    for number in removed:
        queue.remove(str(number))
    left = [number for number in range(len(priorities)) if number not in removed]
    assert drain(queue) == [str(number) for number in sorted(left, key=lambda number: (priorities[number], number))]


def test_a_request_that_comes_back_waits_at_the_end_of_its_priority() -> None:
    queue = WaitingQueue()
    queue.push("a", 0, 0)
    queue.push("b", 0, 1)
    queue.remove("a")
    queue.push("a", 0, 2)
    assert drain(queue) == ["b", "a"]


def test_an_empty_queue_has_nothing_to_give() -> None:
    queue = WaitingQueue()
    queue.remove("unknown")
    with pytest.raises(IndexError):
        queue.pop()
