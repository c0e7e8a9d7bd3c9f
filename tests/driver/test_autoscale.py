"""The number of replicas follows the load: within bounds, after the delays, without flapping."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.config import AutoscalingSettings
from shardray.runtime.driver.autoscale import LoadHistory, LoadSample, decide, desired_replicas

FACTORS = st.floats(0.05, 3.0)
LOADS = st.integers(0, 400)


@st.composite
def autoscalings(draw: st.DrawFn) -> AutoscalingSettings:
    least = draw(st.integers(1, 5))
    return AutoscalingSettings(
        min_replicas=least,
        max_replicas=least + draw(st.integers(0, 10)),
        target_ongoing_requests=draw(st.floats(0.5, 64.0)),
        upscale_delay_s=draw(st.floats(0.0, 20.0)),
        downscale_delay_s=draw(st.floats(0.0, 60.0)),
        upscaling_factor=draw(FACTORS),
        downscaling_factor=draw(FACTORS),
        look_back_period_s=draw(st.floats(1.0, 30.0)),
    )


def replay(chosen: AutoscalingSettings, loads: list[int], num_replicas: int) -> list[int]:
    """The number of replicas after each second."""
    history, counts = LoadHistory(), []
    for second, load in enumerate(loads):
        num_replicas, history = decide(chosen, history, LoadSample(float(second), load), num_replicas)
        counts.append(num_replicas)
    return counts


def changes(counts: list[int], start: int) -> list[tuple[int, int]]:
    """(second, difference) of each change."""
    pairs = zip([start, *counts], counts, strict=False)
    return [(second, after - before) for second, (before, after) in enumerate(pairs) if after != before]


@given(autoscalings(), st.lists(LOADS, min_size=1, max_size=200), st.integers(1, 30))
def test_the_number_never_leaves_the_bounds(chosen: AutoscalingSettings, loads: list[int], start: int) -> None:
    assert chosen.max_replicas is not None
    counts = replay(chosen, loads, start)
    assert all(chosen.min_replicas <= count <= chosen.max_replicas for count in counts)


@given(autoscalings(), st.lists(LOADS, min_size=1, max_size=200))
def test_a_change_waits_for_its_delay_after_the_start_and_after_any_other(
    chosen: AutoscalingSettings, loads: list[int]
) -> None:
    start = chosen.min_replicas
    earlier = 0
    for second, difference in changes(replay(chosen, loads, start), start):
        assert second - earlier >= (chosen.upscale_delay_s if difference > 0 else chosen.downscale_delay_s)
        earlier = second


@given(autoscalings(), LOADS, st.integers(1, 15))
def test_a_steady_load_never_flaps_and_ends_at_what_it_needs(
    chosen: AutoscalingSettings, load: int, start: int
) -> None:
    assert chosen.max_replicas is not None
    start = max(chosen.min_replicas, min(start, chosen.max_replicas))
    counts = replay(chosen, [load] * 1000, start)
    directions = [math.copysign(1, difference) for _, difference in changes(counts, start)]
    assert directions == sorted(directions, reverse=True)  # up, then down: never up again
    needed = math.ceil(load / chosen.target_ongoing_requests)
    assert counts[-1] == max(chosen.min_replicas, min(needed, chosen.max_replicas))


@given(autoscalings(), st.lists(LOADS, min_size=1, max_size=50))
def test_what_the_load_needs_is_never_undercut_on_the_way_down(chosen: AutoscalingSettings, loads: list[int]) -> None:
    for load in loads:
        desired = desired_replicas(chosen, load, 15)
        assert chosen.max_replicas is not None
        assert desired >= min(math.ceil(load / chosen.target_ongoing_requests), chosen.max_replicas)


def test_a_burst_shorter_than_the_delay_adds_nothing() -> None:
    chosen = AutoscalingSettings(max_replicas=8, target_ongoing_requests=4, upscale_delay_s=10, look_back_period_s=1)
    assert set(replay(chosen, [0] * 5 + [100] * 9 + [0] * 50, 1)) == {1}
    assert max(replay(chosen, [0] * 5 + [100] * 12, 1)) == 8


def test_a_pause_shorter_than_the_delay_removes_nothing() -> None:
    chosen = AutoscalingSettings(max_replicas=8, target_ongoing_requests=4, downscale_delay_s=60, look_back_period_s=1)
    assert min(replay(chosen, [32] * 5 + [0] * 59 + [32] * 50, 8)) == 8
    assert replay(chosen, [32] * 5 + [0] * 62, 8)[-1] == 1


@pytest.mark.parametrize(
    ("up", "down", "load", "num_replicas", "expected"),
    [
        (1.0, 1.0, 40, 2, 4),
        (0.5, 1.0, 40, 2, 3),
        (2.0, 1.0, 40, 2, 6),
        (1.0, 1.0, 10, 4, 1),
        (1.0, 0.5, 10, 5, 3),
        (1.0, 0.1, 10, 3, 2),
        (1.0, 3.0, 20, 4, 2),
        (1.0, 1.0, 30, 3, 3),
        (1.0, 1.0, 31, 3, 4),
        (0.05, 1.0, math.nextafter(30, 31), 3, 4),
        (1.0, 1.0, 0, 3, 1),
        (1.0, 1.0, 9999, 3, 10),
    ],
)
def test_the_factors_scale_the_way_to_what_the_load_needs(
    up: float, down: float, load: float, num_replicas: int, expected: int
) -> None:
    chosen = AutoscalingSettings(
        max_replicas=10, target_ongoing_requests=10, upscaling_factor=up, downscaling_factor=down
    )
    assert desired_replicas(chosen, load, num_replicas) == expected
