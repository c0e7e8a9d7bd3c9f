"""A client that is refused is told when the queue will have drained, by how it has been draining."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.driver.pace import QueuePace


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def run_down(pace: QueuePace, clock: Clock, first: int, last: int, every_s: float) -> None:
    for num_waiting in range(first, last - 1, -1):
        clock.now_s += every_s
        pace.observe(num_waiting)


def test_the_wait_is_the_requests_ahead_over_the_pace_at_which_they_leave() -> None:
    clock = Clock()
    pace = QueuePace(clock)
    pace.observe(100)
    run_down(pace, clock, 99, 20, every_s=0.1)
    assert pace.drain_s() == pytest.approx(2.0)


def test_time_without_a_queue_does_not_count() -> None:
    clock = Clock()
    pace = QueuePace(clock)
    pace.observe(50)
    run_down(pace, clock, 49, 0, every_s=0.1)
    clock.now_s += 3600.0
    pace.observe(40)
    assert pace.drain_s() == pytest.approx(4.0)


def test_a_request_that_need_not_wait_does_not_count() -> None:
    clock = Clock()
    pace = QueuePace(clock)
    for _ in range(1000):
        clock.now_s += 0.001
        pace.observe(0)
    pace.observe(10)
    run_down(pace, clock, 9, 5, every_s=2.0)
    assert pace.drain_s() == pytest.approx(10.0)


def test_a_queue_that_stands_still_asks_for_more_and_more_patience() -> None:
    clock = Clock()
    pace = QueuePace(clock)
    pace.observe(8)
    waits = []
    for _ in range(6):
        clock.now_s += 3.0
        waits.append(pace.drain_s())
    assert waits == sorted(waits)
    assert waits[-1] == 60.0


@given(lengths=st.lists(st.tuples(st.integers(0, 300), st.floats(0.0, 1e6)), max_size=100))
def test_the_wait_is_bounded_whatever_happened(lengths: list[tuple[int, float]]) -> None:
    clock = Clock()
    pace = QueuePace(clock)
    for num_waiting, pause_s in lengths:
        clock.now_s += pause_s
        pace.observe(num_waiting)
        assert 0.25 <= pace.drain_s() <= 60.0
