"""The short forms of load and abuse, against a real ``shardray serve``; ``python -m tests.abuse`` is the long form."""

from __future__ import annotations

import pytest

from tests.abuse.fleet import MAX_QUEUED, AbusedFleet
from tests.abuse.scenarios import Figures, garbage, idle_connections, overload, slow_readers, vanishing
from tests.abuse.wire import ATTACKS

pytestmark = pytest.mark.integration


def test_at_four_times_the_capacity_the_admitted_are_served_and_the_others_told_when_to_come(
    fleet: AbusedFleet,
) -> None:
    figures = overload(fleet, seconds=8, settled_s=4)
    check_overload(figures, memory_percent=8)


@pytest.mark.slow
def test_a_minute_of_four_times_the_capacity_changes_neither_memory_nor_latency(fleet: AbusedFleet) -> None:
    figures = overload(fleet, seconds=60)
    check_overload(figures, memory_percent=5)
    second_quarter_s, last_quarter_s = figures["first_token_s"]
    assert last_quarter_s < 2 * second_quarter_s + 0.5


def test_clients_that_vanish_leave_nothing_behind(fleet: AbusedFleet) -> None:
    check_vanished(vanishing(fleet, num_clients=100), num_clients=100)


@pytest.mark.slow
def test_a_thousand_clients_that_vanish_leave_nothing_behind(fleet: AbusedFleet) -> None:
    check_vanished(vanishing(fleet, num_clients=1000), num_clients=1000)


def test_slow_readers_cost_little_hold_up_nobody_and_get_all_when_they_read_on(fleet: AbusedFleet) -> None:
    figures = slow_readers(fleet, seconds=4)
    assert set(figures["read_on"]) == {400}
    assert max(figures["messages"]) < 400
    assert max(figures["shut_window_bytes"]) <= 1000
    assert figures["driver_mb_per_slow_reader"] < 5
    check_pace(figures)
    assert figures["left"] == []


def test_idle_connections_hold_up_nobody(fleet: AbusedFleet) -> None:
    check_idle(idle_connections(fleet, num_connections=1000, seconds=3), num_connections=1000)


@pytest.mark.slow
def test_ten_thousand_idle_connections_hold_up_nobody(fleet: AbusedFleet) -> None:
    check_idle(idle_connections(fleet, num_connections=10_000), num_connections=9000)


def test_garbage_on_the_wire_holds_up_nobody(fleet: AbusedFleet) -> None:
    check_garbage(garbage(fleet, seconds=8))


@pytest.mark.slow
def test_a_minute_of_garbage_changes_nothing(fleet: AbusedFleet) -> None:
    figures = garbage(fleet, seconds=60)
    check_garbage(figures)
    assert max(figures["memory_growth_percent"].values()) < 5


def check_overload(figures: Figures, memory_percent: float) -> None:
    assert figures["other"] == {}
    assert (figures["cut_short"], figures["without_retry"]) == (0, 0)
    assert figures["refused"] > figures["admitted"] > 0
    assert figures["retry_s"][1] < 3 * figures["queue_s"][1] + 0.5  # what is asked for is what the admitted wait
    assert max(figures["memory_growth_percent"].values()) < memory_percent
    # A wait is the requests ahead ÷ the pace; the pace of a shared machine comes and goes, those ahead are bounded.
    assert 0 < figures["most_queued"] <= MAX_QUEUED
    assert figures["deadlines"]["queue"][1] < 2
    assert all(half_s < 0.2 for half_s, _ in figures["deadlines"].values())
    assert figures["left"] == []


def check_vanished(figures: Figures, num_clients: int) -> None:
    assert sum(figures["ways"].values()) == num_clients
    assert all(figures["ways"].get(f"{way}, streaming") for way in ("reset", "cancel", "close", "kill -9"))
    assert figures["left"] == []
    assert figures["files_left"] <= 2


def check_idle(figures: Figures, num_connections: int) -> None:
    assert figures["open"] >= num_connections
    assert figures["greeted_open"] >= 0.9 * num_connections - 1
    assert figures["driver_kb_per_connection"] < 100
    check_pace(figures)
    assert figures["files_left"] <= 2


def check_garbage(figures: Figures) -> None:
    assert set(figures["attacks"]) == set(ATTACKS)
    check_pace(figures)
    assert figures["left"] == []
    assert figures["files_left"] <= 2


def check_pace(figures: Figures) -> None:
    """Generous: the attackers run on the same cores as the server."""
    pace = figures["pace"]
    assert pace["while"]["num_tokens"] > 20
    assert pace["while"]["p50_ms"] < 5 * pace["before"]["p50_ms"] + 20
    assert pace["while"]["max_ms"] < 3000
