"""Requests that begin alike share pages: what is found, what is computed, and what is given up first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardray.runtime.engine.pages import PagePool
from shardray.runtime.engine.prefixes import Prefix
from shardray.runtime.engine.request import EncoderInfo, SamplingParams
from shardray.runtime.engine.scheduler import Scheduler
from shardray.runtime.engine.step import PageGrant
from tests.engine.scheduling import LIMITS, PLAIN_ID, add, committed, planned, row_lens, run_to_end, stepped

SHARING = replace(LIMITS, prefix_caching=True)
ONE_TOKEN = SamplingParams(max_tokens=1)


def find(pool: PagePool, token_ids: list[int], most: int) -> tuple[Prefix, list[int]]:
    return pool.find("", token_ids, most)


def root(pool: PagePool) -> Prefix:
    return find(pool, [], 0)[0]


def filled(pool: PagePool, token_ids: list[int]) -> list[int]:
    """Pages that hold these tokens, and that nobody holds any more."""
    pages = pool.allocate(len(token_ids) // pool.block_size)
    pool.add_prefix(root(pool), token_ids, pages, len(pages))
    for page in reversed(pages):
        pool.release(page)
    return pages


def test_the_longest_known_prefix_is_found_and_no_more_than_asked_for() -> None:
    pool = PagePool(num_pages=8, block_size=2)
    pages = filled(pool, [1, 2, 3, 4, 5, 6])
    assert find(pool, [1, 2, 3, 4, 9, 9], most=3)[1] == pages[:2]
    assert find(pool, [1, 2, 3, 4, 5, 6], most=2)[1] == pages[:2]
    assert find(pool, [1, 9], most=1) == (root(pool), [])


def test_the_same_tokens_behind_others_are_another_block() -> None:
    pool = PagePool(num_pages=8, block_size=2)
    filled(pool, [1, 2, 7, 7])
    assert find(pool, [7, 7], most=1) == (root(pool), [])
    first = filled(pool, [3, 4, 7, 7])
    assert find(pool, [3, 4, 7, 7], most=2)[1] == first


def test_kept_pages_are_handed_out_when_no_other_is_left_the_end_of_the_oldest_first() -> None:
    pool = PagePool(num_pages=6, block_size=2)
    old, new = filled(pool, [1, 2, 3, 4]), filled(pool, [5, 6, 7, 8])
    assert (pool.num_free, pool.num_used) == (6, 0)
    assert not {*old, *new} & {*pool.allocate(2)}
    assert pool.allocate(1) == [old[1]]
    assert find(pool, [1, 2, 3, 4], most=2)[1] == old[:1]
    pool.retain(old[0])
    assert pool.allocate(2) == new[::-1]
    assert find(pool, [5, 6, 7, 8], most=2) == (root(pool), [])


def test_what_stands_behind_a_block_that_was_given_up_is_not_found_when_the_block_comes_back() -> None:
    pool = PagePool(num_pages=3, block_size=2)
    first, second = filled(pool, [1, 2, 3, 4])
    pool.retain(first)
    pool.retain(second)
    pool.release(first)  # as if it had been held by another, and the second not
    pool.allocate(2)
    assert find(pool, [1, 2, 3, 4], most=2) == (root(pool), [])
    pool.release(second)
    again = pool.allocate(1)
    pool.add_prefix(root(pool), [1, 2], again, 1)
    assert find(pool, [1, 2, 3, 4], most=2)[1] == again


def test_a_second_page_with_the_same_tokens_is_free_as_soon_as_it_is_released() -> None:
    pool = PagePool(num_pages=4, block_size=2)
    (known,) = filled(pool, [1, 2])
    (other,) = pool.allocate(1)
    prefix = pool.add_prefix(root(pool), [1, 2], [other], 1)
    assert prefix == find(pool, [1, 2], most=1)[0]
    pool.release(other)
    assert find(pool, [1, 2], most=1)[1] == [known]
    assert pool.allocate(1) == [other]


def test_forgetting_leaves_pages_in_use_alone_and_finds_nothing() -> None:
    pool = PagePool(num_pages=4, block_size=2)
    filled(pool, [1, 2])
    used = pool.allocate(1)
    prefix = pool.add_prefix(root(pool), [3, 4], used, 1)
    pool.forget_prefixes()
    assert find(pool, [1, 2], most=1) == find(pool, [3, 4], most=1) == (root(pool), [])
    pool.check_integrity(used)
    other = pool.allocate(1)
    pool.add_prefix(root(pool), [8, 8], other, 1)
    used += pool.allocate(1)
    pool.add_prefix(prefix, [3, 4, 5, 6], used, 2)  # behind what is forgotten
    assert find(pool, [8, 8, 5, 6], most=2)[1] == other
    pool.check_integrity([*used, *other])


def test_a_second_request_computes_what_is_its_own_and_always_its_last_token() -> None:
    scheduler = Scheduler(SHARING)
    add(scheduler, "first", prompt_len=10, params=ONE_TOKEN)
    run_to_end(scheduler)
    add(scheduler, "longer", prompt_len=14, params=ONE_TOKEN)
    plan = planned(scheduler)
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(8, 6)]
    assert plan.grants[0] == PageGrant(plan.rows[0].slot, 0, plan.grants[0].pages)
    assert len(plan.grants[0].pages) == 2
    (output,) = committed(scheduler, plan)
    assert output.num_cached_prompt_tokens == 8
    add(scheduler, "whole blocks", prompt_len=8, params=ONE_TOKEN)
    plan = planned(scheduler)
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(4, 4)]
    stats = scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (10 + 14 + 8, 0 + 8 + 4)


def test_requests_of_one_plan_share_what_it_computes() -> None:
    scheduler = Scheduler(replace(SHARING, max_num_batched_tokens=64))
    for request_id in ("a", "b", "c"):
        add(scheduler, request_id, prompt_len=18)
    assert row_lens(planned(scheduler)) == [18, 2, 2]
    stats = scheduler.stats()
    assert stats.num_used_pages == 4 + 3
    assert stats.num_cached_tokens == 16 + 3 * 2
    assert stats.kv_waste == pytest.approx(1 - 22 / 28)


def test_a_conversation_goes_on_behind_what_was_generated() -> None:
    scheduler = Scheduler(SHARING)
    add(scheduler, "first turn", prompt_len=6, max_tokens=7)
    run_to_end(scheduler)
    # 6 + 7 tokens are known; the last one was sampled and never computed.
    add(scheduler, "next turn", prompt_len=6, generated_ids=(PLAIN_ID,) * 7, max_tokens=9)
    assert [(row.start, row.num_tokens) for row in planned(scheduler).rows] == [(12, 1)]


def test_a_token_in_flight_is_no_part_of_a_prefix_before_it_is_known() -> None:
    scheduler = Scheduler(replace(SHARING, max_in_flight=2, lookahead=1))
    add(scheduler, "a", prompt_len=3, max_tokens=9)
    first, second = planned(scheduler), planned(scheduler)  # the second computes the token that the first samples
    scheduler.cancel("a")
    committed(scheduler, first)
    committed(scheduler, second)
    add(scheduler, "b", prompt_len=3, generated_ids=(PLAIN_ID, PLAIN_ID))
    assert [(row.start, row.num_tokens) for row in planned(scheduler).rows] == [(0, 5)]


def test_a_preempted_request_finds_what_is_left_of_its_pages() -> None:
    scheduler = Scheduler(replace(SHARING, num_pages=7))
    add(scheduler, "urgent", prompt_len=9, max_tokens=12)
    add(scheduler, "late", prompt_len=5, priority=1, generated_ids=(9, 9), max_tokens=20)
    while scheduler.stats().num_preemptions == 0:
        stepped(scheduler)
    scheduler.cancel("urgent")
    plan = planned(scheduler)
    assert (plan.rows[0].start, plan.rows[0].num_tokens) == (12, 3)
    committed(scheduler, plan)
    run_to_end(scheduler)
    scheduler.check_integrity()


def test_what_a_request_finds_of_its_own_after_a_preemption_was_not_computed_for_others() -> None:
    scheduler = Scheduler(replace(SHARING, num_pages=6, max_prefill_beside_decodes=1))
    add(scheduler, "urgent", prompt_len=4, max_tokens=14)
    stepped(scheduler)
    add(scheduler, "late", prompt_len=12, priority=1, prefix_scope="other", params=ONE_TOKEN)
    outputs = run_to_end(scheduler)
    stats = scheduler.stats()
    assert (stats.num_preemptions, stats.num_prefix_hits) == (1, 4)
    assert [one.num_cached_prompt_tokens for one in outputs if one.request_id == "late"] == [0]


def test_shared_pages_are_not_asked_for_twice_at_admission() -> None:
    scheduler = Scheduler(replace(SHARING, num_pages=8, max_num_batched_tokens=32))
    add(scheduler, "a", prompt_len=18, max_tokens=2)
    add(scheduler, "b", prompt_len=18, max_tokens=2)  # takes one more page, and 5 without sharing
    assert row_lens(planned(scheduler)) == [18, 2]


def test_pages_that_are_kept_count_as_taken_by_whoever_finds_them() -> None:
    scheduler = Scheduler(replace(SHARING, num_pages=8, max_num_batched_tokens=32))
    add(scheduler, "a", prompt_len=20, params=ONE_TOKEN)
    run_to_end(scheduler)
    add(scheduler, "long", prompt_len=28, max_tokens=4)  # all but one page, five of them found
    add(scheduler, "other", prompt_len=4, priority=1, max_tokens=4, generated_ids=(5,))
    assert row_lens(planned(scheduler)) == [8]


def test_forgotten_prefixes_are_computed_again() -> None:
    scheduler = Scheduler(SHARING)
    add(scheduler, "a", prompt_len=10, params=ONE_TOKEN)
    run_to_end(scheduler)
    scheduler.forget_prefixes()
    add(scheduler, "b", prompt_len=10, params=ONE_TOKEN)
    assert row_lens(planned(scheduler)) == [10]


def test_requests_of_different_scopes_share_nothing() -> None:
    scheduler = Scheduler(SHARING)
    for scope in ("a", "b", "a"):
        add(scheduler, "r", prompt_len=10, params=ONE_TOKEN, prefix_scope=scope)
        plan = planned(scheduler)
        committed(scheduler, plan)
        assert row_lens(plan) == [2 if scheduler.stats().num_steps == 3 else 10]


def test_decoders_behind_an_encoder_share_nothing() -> None:
    encoder = EncoderInfo(max_prompt_len=8, start_ids=(1, 2, 3, 4, 5))
    scheduler = Scheduler(replace(SHARING, encoder=encoder))
    add(scheduler, "a", prompt_len=4, max_tokens=2)
    run_to_end(scheduler)
    add(scheduler, "b", prompt_len=5, max_tokens=2)
    run_to_end(scheduler)
    assert scheduler.stats().num_prefix_queries == 0
