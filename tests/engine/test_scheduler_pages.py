"""Admission by pages, and preemption when they run out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardray.runtime.engine.request import FieldError
from shardray.runtime.engine.scheduler import Scheduler
from tests.engine.scheduling import (
    LIMITS,
    PLAIN_ID,
    add,
    committed,
    planned,
    row_lens,
    run_to_end,
    stepped,
)


def test_admission_asks_for_the_pages_of_the_prompt_and_not_for_those_of_max_tokens() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=16))
    add(scheduler, "a", prompt_len=4, max_tokens=60)
    add(scheduler, "b", prompt_len=4, max_tokens=60)
    assert row_lens(planned(scheduler)) == [4, 4]
    assert scheduler.stats().num_used_pages == 2


def test_a_prompt_waits_until_its_pages_are_free_beside_those_that_begun_prompts_are_still_to_take() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=10))
    add(scheduler, "a", prompt_len=24, max_tokens=1)
    stepped(scheduler)
    add(scheduler, "b", prompt_len=16)
    assert row_lens(planned(scheduler)) == [8]


def test_requests_admitted_together_have_pages_for_all_their_prompts() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=6, max_num_batched_tokens=32))
    add(scheduler, "a", prompt_len=12, max_tokens=8)
    add(scheduler, "b", prompt_len=12, max_tokens=8)
    assert row_lens(planned(scheduler)) == [12]


def test_when_pages_run_out_the_latest_of_the_worst_priority_is_preempted_and_computed_again() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=9))
    add(scheduler, "late but urgent", prompt_len=4, priority=0)
    add(scheduler, "first", prompt_len=4, priority=1)
    add(scheduler, "second", prompt_len=4, priority=1)
    while scheduler.stats().num_preemptions == 0:
        stepped(scheduler)
    assert [output.request_id for output in stepped(scheduler)] == ["late but urgent", "first"]
    scheduler.cancel("first")
    plan = planned(scheduler)
    num_generated = plan.starts[0].num_generated
    assert num_generated > 0
    assert plan.rows[-1].start == 0
    assert plan.rows[-1].token_ids == (100, 101, 102, 103, *[PLAIN_ID] * num_generated)
    committed(scheduler, plan)
    assert len(run_to_end(scheduler)) > 0
    scheduler.check_integrity()


def test_a_preempted_request_goes_back_before_those_that_came_after_it() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=2, max_num_batched_tokens=32, num_pages=6))
    for request_id in ("first", "second", "third"):
        add(scheduler, request_id, max_tokens=18)
    while scheduler.stats().num_preemptions == 0:
        stepped(scheduler)
    assert scheduler.stats().num_waiting == 2
    scheduler.cancel("first")
    outputs = stepped(scheduler)
    assert [output.request_id for output in outputs] == ["second", "third"]


def test_a_preempted_request_takes_its_token_in_flight_and_is_not_admitted_before() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=5, max_in_flight=3, lookahead=1))
    add(scheduler, "first", prompt_len=8, max_tokens=12)
    add(scheduler, "second", prompt_len=4, max_tokens=12)
    older, newer = planned(scheduler), planned(scheduler)
    while scheduler.stats().num_preemptions == 0:
        committed(scheduler, older)
        older, newer = newer, planned(scheduler)
    assert (len(older.rows), len(newer.rows)) == (2, 1)
    scheduler.cancel("first")
    assert scheduler.stats().num_used_pages == 0
    assert scheduler.plan() is None
    assert [output.request_id for output in committed(scheduler, older)] == ["second"]
    plan = planned(scheduler)
    assert plan.rows[0].token_ids == (100, 101, 102, 103, *[PLAIN_ID] * plan.starts[0].num_generated)
    assert committed(scheduler, newer) == []
    assert [output.request_id for output in committed(scheduler, plan)] == ["second"]


def test_the_least_urgent_sequence_keeps_its_pages_and_sits_out_while_it_cannot_grow() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=5))
    add(scheduler, "first", max_tokens=16)
    add(scheduler, "second", max_tokens=16)
    for _ in range(5):
        assert len(stepped(scheduler)) == 2
    assert [output.request_id for output in stepped(scheduler)] == ["first"]
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_used_pages, stats.num_preemptions) == (2, 5, 0)


def test_in_a_pipeline_a_sequence_that_cannot_grow_leaves_its_turn_to_one_that_can() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=5, max_in_flight=2))
    add(scheduler, "first", max_tokens=16)
    add(scheduler, "second", max_tokens=16)
    published = [output.request_id for output in run_to_end(scheduler)]
    assert (published.count("first"), published.count("second")) == (16, 16)


def test_an_urgent_prefill_takes_the_pages_of_a_decode_that_would_have_run_in_the_same_plan() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=13, max_num_batched_tokens=5))
    add(scheduler, "decode", prompt_len=4, priority=1)
    stepped(scheduler)
    add(scheduler, "urgent", prompt_len=40, priority=0, max_tokens=8)
    while scheduler.stats().num_preemptions == 0:
        plan = planned(scheduler)
        committed(scheduler, plan)
    assert row_lens(plan) == [4]
    ends = [output.request_id for output in run_to_end(scheduler) if output.finish_reason]
    assert ends == ["urgent", "decode"]


def test_a_request_that_cannot_fit_alone_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(replace(LIMITS, num_pages=5))
    with pytest.raises(FieldError, match=r"^max_tokens: prompt of 4 tokens \+ max_tokens 17 exceeds the 20 tokens"):
        add(scheduler, "a", prompt_len=4, max_tokens=17)
    assert add(scheduler, "a", prompt_len=4, max_tokens=16) is None
    assert len(run_to_end(scheduler)) == 16
