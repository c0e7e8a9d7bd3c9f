"""A request goes where there is the least to do, what is computed already left out."""

from __future__ import annotations

import pytest

from shardray.runtime.driver.caller import Caller
from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.router import Router
from shardray.runtime.engine.request import EngineStats, SamplingParams, ServedModel

MODEL = ServedModel(vocab_size=50_000, max_model_len=8192, eos_token_ids=(), num_kv_tokens=8192, prefix_block_size=16)
LONG = tuple(range(1000))


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet("m")
    for replica_id in (0, 1, 2):
        fleet.set_ready(replica_id, [])
    return fleet


@pytest.fixture
def router(fleet: Fleet) -> Router:
    router = Router()
    for replica in fleet.ready_replicas():
        router.attach(replica.replica_id, MODEL)
    return router


def entry(*prompt_ids: int, sent_ids: tuple[int, ...] = ()) -> JournalEntry:
    return JournalEntry("a", prompt_ids, SamplingParams(), sent_ids=list(sent_ids))


def picked(router: Router, fleet: Fleet, request: JournalEntry) -> int:
    return router.pick(request, fleet.ready_replicas()).replica_id


def test_the_least_loaded_replica_is_picked_then_the_emptier_one(router: Router, fleet: Fleet) -> None:
    fleet.add_live(0, +1)
    fleet.set_stats(1, EngineStats(num_pages=10, num_used_pages=5))
    assert picked(router, fleet, entry(1)) == 2
    fleet.add_live(2, +1)
    assert picked(router, fleet, entry(1)) == 1


def test_a_search_counts_as_its_beams(router: Router, fleet: Fleet) -> None:
    fleet.add_live(0, +1, num_beams=4)
    fleet.add_live(1, +3)
    fleet.add_live(2, +4)
    assert picked(router, fleet, entry(1)) == 1
    fleet.add_live(0, -1, num_beams=4)
    assert [replica.num_live_sequences for replica in fleet.ready_replicas()] == [0, 3, 4]
    assert picked(router, fleet, entry(1)) == 0


def test_of_equals_the_one_that_was_sent_the_beginning_is_picked(router: Router, fleet: Fleet) -> None:
    router.add(entry(*LONG[:40]), 2)
    assert picked(router, fleet, entry(*LONG[:32], 7, 7)) == 2
    assert picked(router, fleet, entry(7, *LONG[1:40])) == 0
    assert picked(router, fleet, entry(*LONG[:15])) == 0


def test_a_long_conversation_is_worth_a_few_requests_more_and_not_any_number(router: Router, fleet: Fleet) -> None:
    router.add(entry(*LONG[:800], sent_ids=LONG[800:]), 1)
    fleet.add_live(1, +3)
    assert picked(router, fleet, entry(*LONG, 5, 6)) == 1
    assert picked(router, fleet, entry(*LONG[:500], 5, 6)) == 0
    fleet.add_live(1, +1)
    assert picked(router, fleet, entry(*LONG, 5, 6)) == 0


def test_a_replica_that_is_gone_or_formed_again_has_nothing(router: Router, fleet: Fleet) -> None:
    router.add(entry(*LONG), 2)
    router.detach(2)
    assert picked(router, fleet, entry(*LONG)) == 0
    router.attach(2, MODEL)
    assert picked(router, fleet, entry(*LONG)) == 0


def test_replicas_that_share_nothing_are_picked_by_load_alone(fleet: Fleet) -> None:
    router = Router()
    for replica in fleet.ready_replicas():
        router.attach(replica.replica_id, ServedModel(50_000, 8192, (), 8192))
    router.add(entry(*LONG), 2)
    assert picked(router, fleet, entry(*LONG)) == 0


def test_callers_share_nothing_unless_they_are_said_to(fleet: Fleet) -> None:
    ours, theirs = (JournalEntry(Caller(name).own_id("r"), LONG, SamplingParams()) for name in ("us", "them"))
    for shares, expected in ((False, 0), (True, 2)):
        router = Router(shares_between_callers=shares)
        for replica in fleet.ready_replicas():
            router.attach(replica.replica_id, MODEL)
        router.add(ours, 2)
        assert picked(router, fleet, ours) == 2
        assert picked(router, fleet, theirs) == expected
        assert (router.prefix_scope(ours) == router.prefix_scope(theirs)) == shares
    assert Router().prefix_scope(entry(1)) == ""


def test_what_was_used_the_longest_ago_is_thought_to_be_given_up_from_its_end(router: Router, fleet: Fleet) -> None:
    router.add(entry(*LONG[:320]), 1)
    router.add(entry(*range(10_000, 10_000 + 8192 - 160)), 1)  # of 512 blocks ten are left
    fleet.add_live(1, +1)
    router.add(entry(*LONG[:176]), 2)
    fleet.add_live(2, +1)
    fleet.add_live(0, +2)
    assert picked(router, fleet, entry(*LONG[:160])) == 1
    assert picked(router, fleet, entry(*LONG[:176])) == 2
