"""The scheduler's rules, one example each. Tokens come from a stand-in that always samples the same id."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, cast

import pytest

from shardray.runtime.engine.request import EngineRequest, FieldError, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.engine.scheduler import Scheduler, SchedulerLimits
from shardray.runtime.engine.step import Sampled, StepPlan, StepResult

EOS_ID, STOP_ID, PLAIN_ID = 0, 1, 7
LIMITS = SchedulerLimits(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=256,
    block_size=4,
    num_pages=64,
    eos_token_ids=frozenset({EOS_ID}),
)


def add(
    scheduler: Scheduler,
    request_id: str,
    prompt_len: int = 4,
    *,
    priority: int = 0,
    generated_ids: tuple[int, ...] = (),
    max_tokens: int = 20,
    params: SamplingParams | None = None,
) -> TokenOutput | None:
    return scheduler.add(
        EngineRequest(
            request_id=request_id,
            prompt_ids=tuple(range(100, 100 + prompt_len)),
            generated_ids=generated_ids,
            params=params or SamplingParams(max_tokens=max_tokens),
            priority=priority,
        )
    )


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    return plan


def committed(scheduler: Scheduler, plan: StepPlan, token_id: int = PLAIN_ID) -> list[TokenOutput]:
    sampled = tuple(Sampled(token_id) for row in plan.rows if row.samples)
    return scheduler.commit(StepResult(plan.step, sampled))


def stepped(scheduler: Scheduler, token_id: int = PLAIN_ID) -> list[TokenOutput]:
    return committed(scheduler, planned(scheduler), token_id)


def run_to_end(scheduler: Scheduler, token_id: int = PLAIN_ID) -> list[TokenOutput]:
    outputs = []
    while scheduler.has_work:
        outputs += stepped(scheduler, token_id)
    return outputs


def row_lens(plan: StepPlan) -> list[int]:
    return [row.num_tokens for row in plan.rows]


# Batching


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


# Pages


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


# Ends


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


# Frames, limits and figures


def test_ids_travel_with_a_start_only_when_the_sampler_penalizes() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "plain", prompt_len=2, generated_ids=(PLAIN_ID,))
    add(scheduler, "penalized", 2, generated_ids=(PLAIN_ID,), params=SamplingParams(presence_penalty=0.5))
    plain, penalized = planned(scheduler).starts
    assert (plain.prompt_ids, plain.generated_ids, plain.num_generated) == ((), (), 1)
    assert (penalized.prompt_ids, penalized.generated_ids, penalized.num_generated) == ((100, 101), (PLAIN_ID,), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_batched_tokens", 4), ("max_num_seqs", 0), ("num_pages", 0), ("block_size", 0), ("lookahead", 2)],
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
