"""How requests end: stops, lengths, cancellation, and what an earlier mesh had already generated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardray.runtime.engine.request import FinishReason, SamplingParams, TokenOutput
from shardray.runtime.engine.scheduler import Scheduler
from tests.engine.scheduling import (
    EOS_ID,
    LIMITS,
    PLAIN_ID,
    STOP_ID,
    add,
    committed,
    planned,
    run_to_end,
)


@pytest.mark.parametrize(
    ("params", "token_id", "num_tokens", "reason"),
    [
        (SamplingParams(max_tokens=9), EOS_ID, 1, FinishReason.STOP),
        (SamplingParams(max_tokens=9, ignore_eos=True), EOS_ID, 9, FinishReason.LENGTH),
        (SamplingParams(max_tokens=9, stop_token_ids=(STOP_ID,)), STOP_ID, 1, FinishReason.STOP),
        (SamplingParams(max_tokens=9, stop_token_ids=(STOP_ID,), ignore_eos=True), STOP_ID, 1, FinishReason.STOP),
        (SamplingParams(max_tokens=9, min_tokens=3), EOS_ID, 4, FinishReason.STOP),
        (SamplingParams(max_tokens=9), PLAIN_ID, 9, FinishReason.LENGTH),
        (SamplingParams(max_tokens=1), EOS_ID, 1, FinishReason.STOP),
    ],
)
def test_a_request_ends_with_its_published_stop_or_its_length(
    params: SamplingParams, token_id: int, num_tokens: int, reason: FinishReason
) -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a", params=params)
    outputs = run_to_end(scheduler, token_id)
    assert [output.token_id for output in outputs] == [token_id] * num_tokens
    assert [output.finish_reason for output in outputs] == [None] * (num_tokens - 1) + [reason]


def test_a_request_ends_where_the_context_window_does() -> None:
    scheduler = Scheduler(replace(LIMITS, max_model_len=10))
    add(scheduler, "a", prompt_len=4)
    outputs = run_to_end(scheduler)
    assert len(outputs) == 6
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_tokens_sent_by_an_earlier_mesh_are_prefilled_and_counted_but_not_published_again() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a", generated_ids=(PLAIN_ID, PLAIN_ID), max_tokens=5)
    plan = planned(scheduler)
    assert plan.rows[0].token_ids == (100, 101, 102, 103, PLAIN_ID, PLAIN_ID)
    assert plan.starts[0].num_generated == 2
    assert len(committed(scheduler, plan) + run_to_end(scheduler)) == 3


@pytest.mark.parametrize(
    ("generated_ids", "reason"),
    [((PLAIN_ID,) * 5, FinishReason.LENGTH), ((PLAIN_ID, EOS_ID), FinishReason.STOP)],
)
def test_a_request_that_is_already_complete_ends_at_once(generated_ids: tuple[int, ...], reason: FinishReason) -> None:
    scheduler = Scheduler(LIMITS)
    assert add(scheduler, "a", generated_ids=generated_ids, max_tokens=5) == TokenOutput("a", finish_reason=reason)
    assert not scheduler.has_work


def test_a_cancelled_request_frees_its_pages_at_once_and_its_token_in_flight_is_dropped() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a")
    add(scheduler, "b")
    plan = planned(scheduler)
    assert scheduler.cancel("a") == TokenOutput("a", finish_reason=FinishReason.ABORTED)
    assert scheduler.stats().num_used_pages == 1
    assert [output.request_id for output in committed(scheduler, plan)] == ["b"]


def test_a_waiting_request_can_be_cancelled_and_an_unknown_one_is_ignored() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a")
    assert scheduler.cancel("a") is not None
    assert scheduler.cancel("a") is None
    assert scheduler.plan() is None
    assert not scheduler.has_work
