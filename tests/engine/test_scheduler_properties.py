"""Whatever the limits, arrivals, cancellations and preemptions, each request gets the tokens of its undisturbed run."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardray.runtime.engine.limits import SchedulerLimits
from shardray.runtime.engine.request import EngineRequest, FieldError, SamplingParams
from tests.engine.toy_mesh import EOS_ID, VOCAB_SIZE, ToyService, undisturbed_run

NUM_KV_TOKENS = 48  # at least; a request of any_request needs at most this many, and a few of them do not fit together
token_ids = st.integers(0, VOCAB_SIZE - 1)
STEM = tuple(range(1, 9)) * 2  # what many prompts begin with


@st.composite
def any_limits(draw: st.DrawFn) -> SchedulerLimits:
    max_num_seqs, block_size = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    return SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(1, 24)),
        max_prefill_beside_decodes=draw(st.none() | st.integers(1, 24)),
        max_model_len=draw(st.integers(25, 64)),
        block_size=block_size,
        num_pages=-(-NUM_KV_TOKENS // block_size) + draw(st.integers(0, 8)),
        max_in_flight=draw(st.integers(1, 4)),
        lookahead=draw(st.integers(0, 1)),
        max_draft_tokens=draw(st.sampled_from([0, 3, 7])),
        max_drafting_step=draw(st.integers(1, 24)),
        prefix_caching=draw(st.booleans()),
        eos_token_ids=frozenset({EOS_ID}),
    )


def any_beams() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "num_beams": st.integers(2, 4),
            "length_penalty": st.sampled_from([0.0, 1.0, 2.0]),
            "early_stopping": st.booleans(),
        }
    )


def fitting(request: EngineRequest, limits: SchedulerLimits) -> EngineRequest:
    """The request, without its beams if there is no room for them."""
    try:
        limits.check(request)
    except FieldError as error:
        if error.field != "num_beams":
            raise
        params = msgspec.structs.replace(request.params, num_beams=1, length_penalty=1.0, early_stopping=False)
        return msgspec.structs.replace(request, params=params)
    return request


@st.composite
def any_request(draw: st.DrawFn) -> EngineRequest:
    max_tokens = draw(st.integers(1, 24))
    ends = st.fixed_dictionaries({"min_tokens": st.integers(0, max_tokens), "ignore_eos": st.booleans()})
    with_beams = st.builds(lambda *parts: parts[0] | parts[1], ends, any_beams())
    params = SamplingParams(
        seed=draw(st.integers(0, 99)),
        max_tokens=max_tokens,
        stop_token_ids=tuple(draw(st.sets(token_ids, max_size=1))),
        repetition_penalty=draw(st.sampled_from([1.0, 1.1])),
        **draw(st.just({"regex": "a"}) | ends | with_beams),
    )
    stem = STEM[: draw(st.sampled_from([0, 4, 7, 16]))]
    own_ids = draw(st.lists(token_ids, min_size=1, max_size=24 - len(stem)))
    priority = draw(st.integers(-1, 1))
    return EngineRequest(
        request_id="",
        prompt_ids=(*stem, *own_ids),
        params=params,
        priority=priority,
        prefix_scope=draw(st.sampled_from(["", "", "a"])),
    )


def resumed(request: EngineRequest, num_generated: int, max_model_len: int) -> EngineRequest:
    """The request after an earlier mesh sent its first ``num_generated`` tokens."""
    generated_ids, _ = undisturbed_run(request, max_model_len)
    return msgspec.structs.replace(request, generated_ids=tuple(generated_ids[:num_generated]))


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go at any moment, and results come back as late as the limits allow."""

    service: ToyService

    @initialize(limits=any_limits())
    def begin(self, limits: SchedulerLimits) -> None:
        self.service = ToyService(limits)

    @rule(request=any_request(), num_generated=st.integers(0, 6))
    def add(self, request: EngineRequest, num_generated: int) -> None:
        request = msgspec.structs.replace(request, request_id=f"request-{len(self.service.requests)}")
        request = fitting(request, self.service.limits)
        self.service.add(resumed(request, num_generated, self.service.limits.max_model_len))

    @precondition(lambda self: self.service.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.service.cancel(data.draw(st.sampled_from(sorted(self.service.live))))

    @rule()
    def plan(self) -> None:
        self.service.plan()

    @rule()
    def commit(self) -> None:
        self.service.commit()

    @rule(num_steps=st.integers(2, 20))
    def run_steps(self, num_steps: int) -> None:
        """Keep as many plans in flight as go, as the engine's loop does."""
        for _ in range(num_steps):
            while self.service.plan() is not None:
                pass
            self.service.commit()

    @invariant()
    def every_page_and_slot_is_accounted_for(self) -> None:
        if hasattr(self, "service"):
            self.service.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "service"):
            self.service.drain()


TestRequestsThatComeAndGo = SchedulerMachine.TestCase
TestRequestsThatComeAndGo.settings = settings(max_examples=100, stateful_step_count=30)


@given(limits=any_limits(), requests=st.lists(any_request(), min_size=2, max_size=12), seed=st.integers(0, 2**32))
@settings(max_examples=200)
def test_no_token_changes_however_short_the_pages_are(
    limits: SchedulerLimits, requests: list[EngineRequest], seed: int
) -> None:
    random = Random(seed)
    service = ToyService(limits)
    arrivals = [msgspec.structs.replace(request, request_id=str(i)) for i, request in enumerate(requests)]
    while arrivals or random.random() < 0.95:
        if arrivals and random.random() < 0.5:
            service.add(resumed(fitting(arrivals.pop(), limits), random.randrange(6), limits.max_model_len))
        if service.live and random.random() < 0.02:
            service.cancel(random.choice(sorted(service.live)))
        for _ in range(random.randint(0, 3)):
            service.plan()
        for _ in range(random.randint(0, 2)):
            service.commit()
        service.scheduler.check_integrity()
    service.drain()


@given(limits=any_limits(), requests=st.lists(any_request(), min_size=1, max_size=8))
@settings(max_examples=100)
def test_the_first_request_ends_as_soon_as_if_it_were_alone(
    limits: SchedulerLimits, requests: list[EngineRequest]
) -> None:
    limits = replace(limits, max_in_flight=1, lookahead=0, max_draft_tokens=0)  # else faster while no prompt is read

    def num_steps(num_requests: int) -> int:
        service = ToyService(limits)
        for i, request in enumerate(requests[:num_requests]):
            service.add(msgspec.structs.replace(fitting(request, limits), request_id=str(i), priority=0))
        while "0" in service.live:
            service.plan()
            service.commit()
        return service.scheduler.stats().num_steps

    assert num_steps(len(requests)) == num_steps(1)
