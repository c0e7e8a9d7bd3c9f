"""What goes into a plan: batching, pipelines, lookahead, and the figures."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, cast

import pytest

from shardray.runtime.engine.request import FieldError, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.engine.scheduler import Scheduler
from shardray.runtime.engine.step import Sampled, StepResult
from tests.engine.scheduling import (
    EOS_ID,
    LIMITS,
    PLAIN_ID,
    add,
    committed,
    planned,
    row_lens,
    run_to_end,
    stepped,
)


def test_decodes_go_in_every_plan_while_a_long_prompt_is_prefilled_beside_them() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "short")
    stepped(scheduler)
    add(scheduler, "long", prompt_len=40)
    chunks = []
    for _ in range(3):
        plan = planned(scheduler)
        chunks.append(row_lens(plan))
        assert committed(scheduler, plan)[0].request_id == "short"
    assert chunks == [[1, 15], [1, 15], [1, 10]]


def test_a_prompt_gets_on_even_when_decodes_hold_all_but_one_slot_and_the_budget_is_tight() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_batched_tokens=5))
    for i in range(3):
        add(scheduler, f"decode{i}", prompt_len=1)
    stepped(scheduler)
    add(scheduler, "prompt", prompt_len=5)
    assert row_lens(planned(scheduler)) == [1, 1, 1, 2]


def test_a_chunk_that_does_not_reach_the_end_samples_nothing_and_the_next_may_follow_at_once() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=2, lookahead=1))
    add(scheduler, "a", prompt_len=20)
    first, second = planned(scheduler), planned(scheduler)
    assert [(row.start, row.num_tokens, row.samples) for row in first.rows + second.rows] == [
        (0, 16, False),
        (16, 4, True),
    ]
    assert committed(scheduler, first) == []
    assert committed(scheduler, second) == [TokenOutput("a", PLAIN_ID)]


def test_a_prompt_already_begun_goes_before_a_new_one() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "begun", prompt_len=24)
    stepped(scheduler)
    add(scheduler, "new", prompt_len=24)
    assert row_lens(planned(scheduler)) == [8, 8]


def test_requests_are_admitted_first_come_within_a_priority_and_lower_priorities_first() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=1))
    for request_id, priority in [("b1", 5), ("a1", -1), ("b2", 5), ("a2", -1)]:
        add(scheduler, request_id, priority=priority, max_tokens=1)
    assert [output.request_id for output in run_to_end(scheduler)] == ["a1", "a2", "b1", "b2"]


def test_pages_and_slot_of_an_ended_request_serve_the_very_next_plan() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=1, num_pages=2))
    add(scheduler, "a", max_tokens=2)
    add(scheduler, "b", max_tokens=4)
    first = planned(scheduler)
    committed(scheduler, first, EOS_ID)
    second = planned(scheduler)
    assert second.starts[0].slot == first.starts[0].slot
    assert second.grants == first.grants


def test_a_request_whose_logits_are_not_numbers_ends_and_the_others_go_on() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a", max_tokens=5)
    add(scheduler, "b", max_tokens=2)
    plan = planned(scheduler)
    result = StepResult(plan.step, (Sampled(-1), Sampled(7)))
    ended, token = scheduler.commit(result)
    assert (ended.request_id, ended.token_id, ended.finish_reason) == ("a", None, FinishReason.ERROR)
    assert "bfloat16 or float32" in (ended.error or "")
    assert (token.request_id, token.token_id) == ("b", 7)
    assert [output.request_id for output in run_to_end(scheduler)] == ["b"]
    scheduler.check_integrity()


def test_prompts_take_the_whole_budget_alone_and_a_bounded_part_of_it_beside_decodes() -> None:
    scheduler = Scheduler(replace(LIMITS, max_prefill_beside_decodes=3))
    add(scheduler, "a", prompt_len=10)
    plan = planned(scheduler)
    assert row_lens(plan) == [10]
    committed(scheduler, plan)
    add(scheduler, "b", prompt_len=8)
    for expected in ([1, 3], [1, 3], [1, 2]):
        plan = planned(scheduler)
        assert sorted(row_lens(plan)) == sorted(expected)
        committed(scheduler, plan)


def test_steps_of_decodes_and_prompts_mostly_have_a_multiple_of_16_tokens() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=512, max_prefill_beside_decodes=64)
    for num_decodes in range(1, 64):
        budget = limits.prefill_budget(num_decodes)
        assert 64 - 16 < budget <= 64
        assert (num_decodes + budget) % 16 == 0
    assert limits.prefill_budget(0) == 512
    assert replace(limits, max_prefill_beside_decodes=5).prefill_budget(13) == 3
    assert replace(limits, max_prefill_beside_decodes=5).prefill_budget(12) == 4
    assert replace(limits, max_prefill_beside_decodes=5).prefill_budget(14) == 2
    assert replace(limits, max_prefill_beside_decodes=1).prefill_budget(15) == 1


@pytest.mark.parametrize(("num_waiting", "expected"), [(1, 64), (2, 64), (3, 96), (5, 160), (8, 256), (20, 256)])
def test_the_more_requests_wait_for_each_stream_the_more_is_read_beside_it(num_waiting: int, expected: int) -> None:
    limits = replace(
        LIMITS, max_num_batched_tokens=512, max_prefill_beside_decodes=64, max_num_seqs=32, num_pages=512,
        max_model_len=256,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    for name in "ab":
        add(scheduler, name, prompt_len=4)
    committed(scheduler, planned(scheduler))
    for i in range(num_waiting):
        add(scheduler, f"r{i}", prompt_len=200)
    lens = row_lens(planned(scheduler))
    assert lens[:2] == [1, 1]
    assert sum(lens[2:]) == expected - 2  # whole steps are multiples of 16


def test_requests_that_have_no_slot_do_not_count_as_waiting_to_be_read() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=512, max_prefill_beside_decodes=8, max_num_seqs=3, num_pages=512)
    scheduler = Scheduler(limits)
    for name in "ab":
        add(scheduler, name, prompt_len=4)
    committed(scheduler, planned(scheduler))
    for i in range(20):
        add(scheduler, f"r{i}", prompt_len=16)
    assert row_lens(planned(scheduler)) == [1, 1, 8]


# Pipelines: several plans in flight, no lookahead


def test_a_pipeline_gets_plans_of_equal_size_and_each_sequence_in_one_of_them() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=2))
    for i in range(4):
        add(scheduler, f"r{i}", prompt_len=2)
    committed(scheduler, planned(scheduler))
    first, second = planned(scheduler), planned(scheduler)
    assert len(first.rows) == len(second.rows) == 2
    assert {row.slot for row in first.rows + second.rows} == {0, 1, 2, 3}
    assert scheduler.plan() is None
    assert all(row.token_ids == (PLAIN_ID,) for row in first.rows + second.rows)


def test_a_pipeline_divides_the_prefill_budget_among_its_plans() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=2))
    add(scheduler, "a", prompt_len=16)
    assert [row_lens(planned(scheduler)), row_lens(planned(scheduler))] == [[8], [8]]


def test_a_prompt_gets_on_in_every_plan_of_a_pipeline_even_when_its_share_of_the_budget_is_one_decode() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=3, max_num_batched_tokens=4, max_in_flight=4))
    add(scheduler, "a", prompt_len=1)
    add(scheduler, "b", prompt_len=1)
    stepped(scheduler)
    stepped(scheduler)
    add(scheduler, "prompt", prompt_len=8)
    for _ in range(3):
        plan = planned(scheduler)
        assert row_lens(plan) == [1, 1]
        committed(scheduler, plan)


def test_every_sequence_has_its_turn_even_when_only_one_of_several_plans_is_kept_in_flight() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=4))
    for i in range(4):
        add(scheduler, f"r{i}", prompt_len=1)
    stepped(scheduler)
    assert {stepped(scheduler)[0].request_id for _ in range(4)} == {"r0", "r1", "r2", "r3"}


# Lookahead: the next step is planned while a token is still unresolved


def test_with_lookahead_a_row_without_ids_stands_for_the_token_sampled_last() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=2, lookahead=1))
    add(scheduler, "a")
    planned(scheduler)
    (row,) = planned(scheduler).rows
    assert (row.start, row.token_ids, row.samples) == (4, (), True)


def test_no_more_than_one_token_of_a_sequence_is_unresolved_when_it_is_planned() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=3, lookahead=1))
    add(scheduler, "a")
    planned(scheduler)
    planned(scheduler)
    assert scheduler.plan() is None


def test_with_lookahead_the_row_planned_past_a_stop_is_dropped_silently() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=2, lookahead=1))
    add(scheduler, "a")
    first, surplus = planned(scheduler), planned(scheduler)
    assert committed(scheduler, first, EOS_ID) == [TokenOutput("a", EOS_ID, finish_reason=FinishReason.STOP)]
    assert scheduler.has_work
    assert committed(scheduler, surplus) == []
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_nothing_is_planned_past_a_length_that_is_known_ahead() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=2, lookahead=1))
    add(scheduler, "a", max_tokens=2)
    plans = [planned(scheduler), planned(scheduler)]
    committed(scheduler, plans[0])
    assert scheduler.plan() is None
    assert committed(scheduler, plans[1])[0].finish_reason is FinishReason.LENGTH


# Frames, limits and figures


def test_ids_travel_with_a_start_only_when_the_sampler_penalizes_or_constrains() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "plain", prompt_len=2, generated_ids=(PLAIN_ID,))
    add(scheduler, "penalized", 2, generated_ids=(PLAIN_ID,), params=SamplingParams(presence_penalty=0.5))
    add(scheduler, "constrained", 2, generated_ids=(PLAIN_ID,), params=SamplingParams(regex="a+"))
    plain, penalized, constrained = planned(scheduler).starts
    assert (plain.prompt_ids, plain.generated_ids, plain.num_generated) == ((), (), 1)
    assert (penalized.prompt_ids, penalized.generated_ids, penalized.num_generated) == ((100, 101), (PLAIN_ID,), 1)
    assert (constrained.prompt_ids, constrained.generated_ids, constrained.num_generated) == ((), (PLAIN_ID,), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_batched_tokens", 4),
        ("max_prefill_beside_decodes", 0),
        ("max_num_seqs", 0),
        ("num_pages", 0),
        ("block_size", 0),
        ("lookahead", 2),
    ],
)
def test_limits_that_cannot_work_are_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(FieldError, match=f"^{field}: {value} must"):
        replace(LIMITS, **cast(dict[str, Any], {field: value}))


def test_prompts_that_cannot_run_and_ids_in_use_are_refused() -> None:
    scheduler = Scheduler(LIMITS)
    with pytest.raises(FieldError, match="prompt: has no tokens"):
        add(scheduler, "a", prompt_len=0)
    with pytest.raises(FieldError, match="prompt: 256 tokens leave no room in a context window of 256"):
        add(scheduler, "a", prompt_len=256)
    add(scheduler, "a")
    with pytest.raises(FieldError, match="request_id: 'a' is already in use"):
        add(scheduler, "a")


def test_a_result_out_of_order_is_an_error() -> None:
    scheduler = Scheduler(replace(LIMITS, max_in_flight=2))
    add(scheduler, "a", prompt_len=16)
    planned(scheduler)
    with pytest.raises(ValueError, match="the result of step 1 came when that of step 0 was due"):
        committed(scheduler, planned(scheduler))


def test_stats_count_what_runs_waits_and_is_held() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=1))
    add(scheduler, "a", prompt_len=5, max_tokens=3)
    add(scheduler, "b", prompt_len=5, max_tokens=3)
    stepped(scheduler)
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_pages, stats.num_cached_tokens) == (1, 1, 2, 5)
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_output_tokens) == (1, 5, 1)
    assert stats.kv_waste == pytest.approx(3 / 8)


def test_a_plan_and_its_commit_take_little_time_at_256_sequences_with_ten_thousand_waiting() -> None:
    scheduler = Scheduler(
        replace(LIMITS, max_num_seqs=256, max_num_batched_tokens=2048, num_pages=20_000, max_in_flight=2, lookahead=1)
    )
    for i in range(10_000):
        add(scheduler, f"r{i}", prompt_len=8, max_tokens=200)
    stepped(scheduler)
    durations_s = []
    for _ in range(30):
        began = time.perf_counter()
        stepped(scheduler)
        durations_s.append(time.perf_counter() - began)
    assert min(durations_s) < 0.01  # about 0.001 on a quiet machine


@pytest.mark.parametrize("num_pages", [1, 3])
def test_a_page_that_is_held_for_nobody_is_noticed_as_soon_as_no_request_is_live(num_pages: int) -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a")
    run_to_end(scheduler)
    scheduler.check_idle()
    scheduler._pages.pool.allocate(num_pages)
    with pytest.raises(RuntimeError, match=f"^{num_pages} pages and 0 slots are held, but no request is live"):
        scheduler.check_idle()
