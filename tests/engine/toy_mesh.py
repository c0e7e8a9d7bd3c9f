"""A toy mesh whose every token depends on all that the page tables let it read, and a service that checks its texts.

The toy model's next token is a hash of the tokens found in the simulated KV pages, so a wrong page table, a page reused
too early, a wrong start or a lost token changes the text. Some requests' texts repeat themselves now and then: there,
all but every ninth token depends on the one before it alone. A constraint bars nothing here, and comes late.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field

from shardray.runtime.engine.beams import BeamSearch
from shardray.runtime.engine.limits import SchedulerLimits
from shardray.runtime.engine.request import EngineRequest, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.engine.scheduler import Scheduler
from shardray.runtime.engine.step import NOT_YET, Row, Sampled, SlotStart, StepPlan, StepResult

VOCAB_SIZE = 12
EOS_ID = 0


def next_token(history: list[int], num_generated: int, params: SamplingParams) -> int:
    """A hash of the history; before min_tokens it is drawn again until it is no stop."""
    barred_ids = {EOS_ID, *params.stop_token_ids} if num_generated < params.min_tokens else set()
    draw = 0
    repeats = (params.seed or 0) % 2 == 1 and len(history) % 9 != 0
    seen = history[-1:] if repeats else history
    while True:
        token_id = zlib.crc32(repr((seen, params.seed, draw)).encode()) % VOCAB_SIZE
        if token_id not in barred_ids:
            return token_id
        draw += 1


def candidates(history: list[int], num_generated: int, params: SamplingParams) -> tuple[tuple[int, float], ...]:
    """What the search of a beam with this history is given: all tokens that are not barred, the best first."""
    barred_ids = {EOS_ID, *params.stop_token_ids} if num_generated < params.min_tokens else set()
    free_ids = [token_id for token_id in range(VOCAB_SIZE) if token_id not in barred_ids]
    scored = [(token_id, -(zlib.crc32(repr((history, params.seed, token_id)).encode()) % 997)) for token_id in free_ids]
    return tuple(sorted(scored, key=lambda candidate: -candidate[1]))


def undisturbed_search(request: EngineRequest, max_tokens: int, stop_ids: set[int]) -> tuple[list[int], FinishReason]:
    params, search = request.params, BeamSearch(request.params, stop_ids, max_tokens)
    while not search.is_over:
        histories = [[*request.prompt_ids, *beam.token_ids] for beam in search.beams]
        num_generated = len(search.beams[0].token_ids)
        search.advance([candidates(history, num_generated, params) for history in histories])
    return list(search.best.token_ids), search.best.reason


def undisturbed_run(request: EngineRequest, max_model_len: int) -> tuple[list[int], FinishReason]:
    """All generated tokens of a request that has the machine to itself, and why it ends."""
    params, generated_ids = request.params, list(request.generated_ids)
    stop_ids = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS_ID})
    max_tokens = min(params.max_tokens, max_model_len - len(request.prompt_ids))
    if params.num_beams > 1:
        return undisturbed_search(request, max_tokens, stop_ids)
    while True:
        if len(generated_ids) > params.min_tokens and generated_ids[-1] in stop_ids:
            return generated_ids, FinishReason.STOP
        if len(generated_ids) >= max_tokens:
            return generated_ids, FinishReason.LENGTH
        generated_ids.append(next_token([*request.prompt_ids, *generated_ids], len(generated_ids), params))


@dataclass
class ToySlot:
    """What a rank knows of a slot."""

    start: SlotStart
    pages: list[int] = field(default_factory=list)
    kv_len: int = 0
    sampled_ids: list[int] = field(default_factory=list)  # behind drafted tokens, also those that are not good
    num_drafted: int = 0  # in its last row
    num_waits: int = 0  # rows that are to be run again before it has a token
    is_again: bool = False  # its last row is
    is_copied: bool = False  # the page that its first row writes to holds what was copied from another


class ToyMesh:
    """Runs plans in order over simulated KV pages; results wait in order until they are taken."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.kv: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset) -> (position, token id)
        self.slots: dict[int, ToySlot] = {}
        self.results: deque[StepResult] = deque()

    def run(self, plan: StepPlan) -> None:
        for start in plan.starts:
            num_waits = zlib.crc32(repr(start).encode()) % 4 if start.params.constraint else 0
            self.slots[start.slot] = ToySlot(start, num_waits=num_waits)
        for grant in plan.grants:
            slot = self.slots[grant.slot]
            assert grant.first_block == len(slot.pages)
            slot.pages += grant.pages
            slot.is_copied = not slot.kv_len and not {*grant.pages}.isdisjoint(target for _, target in plan.copies)
        for source, target in plan.copies:
            self.kv.update({(target, i): self.kv[source, i] for i in range(self.block_size) if (source, i) in self.kv})
        places = [place for row in plan.rows for place in self._write(row)]
        assert len(set(places)) == len(places), "two rows of one step wrote to one place"
        sampled = tuple(self._sample(self.slots[slot], position) for slot, position in plan.sampled)
        self.results.append(StepResult(plan.step, sampled))

    def _place(self, slot: ToySlot, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_size)
        return slot.pages[block], offset

    def _write(self, row: Row) -> list[tuple[int, int]]:
        slot = self.slots[row.slot]
        if not slot.kv_len:  # what its first pages hold already
            assert row.start % self.block_size == 0 or slot.is_copied or slot.start.params.penalizes
            slot.kv_len = row.start
        assert slot.kv_len - slot.num_drafted - slot.is_again <= row.start <= slot.kv_len - slot.is_again
        slot.is_again = False
        assert row.token_ids or not slot.num_drafted, "the slot does not know which of its last tokens were good"
        token_ids = row.token_ids or (slot.sampled_ids[-1],)
        slot.kv_len, slot.num_drafted = row.start + len(token_ids), row.num_drafted
        places = [self._place(slot, position) for position in range(row.start, slot.kv_len)]
        for position, (place, token_id) in enumerate(zip(places, token_ids, strict=True), row.start):
            self.kv[place] = (position, token_id)
        return places

    def _sample(self, slot: ToySlot, position: int) -> Sampled:
        positions, history = zip(*(self.kv[self._place(slot, i)] for i in range(position)), strict=True)
        assert positions == tuple(range(position)), "a page was overwritten by another sequence"
        start = slot.start
        if start.params.penalizes:
            assert history == (*start.prompt_ids, *start.generated_ids, *slot.sampled_ids)
        else:
            assert not start.prompt_ids
            assert len(start.generated_ids) == (start.num_generated if start.params.constraint else 0)
            if start.generated_ids and not slot.sampled_ids:
                assert history[-start.num_generated :] == start.generated_ids
        if slot.num_waits:
            slot.num_waits, slot.is_again = slot.num_waits - 1, True
            return Sampled(NOT_YET)
        num_generated = start.num_generated + len(slot.sampled_ids)
        slot.sampled_ids.append(next_token(list(history), num_generated, start.params))
        is_beam = start.params.num_beams > 1
        top_logprobs = candidates(list(history), num_generated, start.params) if is_beam else ()
        return Sampled(slot.sampled_ids[-1], None, top_logprobs)


class ToyService:
    """A scheduler over a toy mesh. Every plan is held against the limits, every token against the undisturbed run."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.mesh = ToyMesh(limits.block_size)
        self.requests: dict[str, EngineRequest] = {}
        self.live: dict[str, list[int]] = {}  # generated so far

    @property
    def max_num_steps(self) -> int:
        """Far more steps than it takes when each one moves at least the most urgent request on."""
        num_tokens = sum(len(request.prompt_ids) + request.params.max_tokens + 3 for request in self.requests.values())
        return num_tokens * (1 + len(self.requests))

    def add(self, request: EngineRequest) -> None:
        end = self.scheduler.add(request)
        self.requests[request.request_id] = request
        generated_ids, reason = undisturbed_run(request, self.limits.max_model_len)
        if len(generated_ids) > len(request.generated_ids) or request.params.num_beams > 1:
            assert end is None
            self.live[request.request_id] = list(request.generated_ids)
        else:
            assert end == TokenOutput(request.request_id, finish_reason=reason)

    def cancel(self, request_id: str) -> None:
        assert self.scheduler.cancel(request_id) == TokenOutput(request_id, finish_reason=FinishReason.ABORTED)
        assert self.scheduler.cancel(request_id) is None
        del self.live[request_id]

    def plan(self) -> StepPlan | None:
        """Plan and run a step."""
        plan = self.scheduler.plan()
        if plan is None:
            assert self.mesh.results or not self.scheduler.has_work, "nothing runs and nothing is due: stuck"
            return None
        slots = {row.slot for row in plan.rows}
        assert 0 < plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len(slots) == len(plan.rows)
        assert slots <= set(range(self.limits.max_num_seqs))
        assert self.limits.lookahead or all(row.token_ids for row in plan.rows)
        assert all(row.num_drafted <= self.limits.max_draft_tokens for row in plan.rows)
        if any(row.num_drafted for row in plan.rows):
            assert plan.num_tokens <= self.limits.max_drafting_step
            assert all(row.num_tokens == 1 + row.num_drafted for row in plan.rows), "a prompt is read as well"
        sources, targets = [source for source, _ in plan.copies], [target for _, target in plan.copies]
        pool = self.scheduler._pages.pool
        assert pool.count_free([*sources, *targets]) == 0, "what is copied, or what it is copied to, has no holder"
        assert len({*targets} - {*sources}) == len(targets)
        self.mesh.run(plan)
        assert len(self.mesh.results) <= self.limits.max_in_flight
        return plan

    def commit(self) -> None:
        """Commit the oldest result, if any is due."""
        if self.mesh.results:
            for output in self.scheduler.commit(self.mesh.results.popleft()):
                self._check(output)

    def drain(self) -> None:
        """Run to the end of all requests, with as many plans in flight as may be; then nothing is held any more."""
        while self.scheduler.has_work:
            while self.plan() is not None:
                pass
            self.commit()
            assert self.scheduler.stats().num_steps <= self.max_num_steps
        stats = self.scheduler.stats()
        assert not self.live
        assert (stats.num_running, stats.num_waiting, stats.num_used_pages, stats.num_cached_tokens) == (0, 0, 0, 0)
        self.scheduler.check_integrity()

    def _check(self, output: TokenOutput) -> None:
        generated_ids = self.live[output.request_id]
        if output.token_id is not None:
            generated_ids.append(output.token_id)
        expected_ids, reason = undisturbed_run(self.requests[output.request_id], self.limits.max_model_len)
        assert generated_ids == expected_ids[: len(generated_ids)]
        assert output.token_id is not None or generated_ids == expected_ids, "only what had been sent has no token"
        assert output.finish_reason == (reason if len(generated_ids) == len(expected_ids) else None)
        if output.finish_reason is not None:
            del self.live[output.request_id]
