"""Which tokens of which requests run in the next step, and on which pages: continuous batching in plain Python.

The leader alone schedules. Every rank runs the plans in the order they were made, so what a finished, cancelled or
preempted sequence held can be given away by the very next plan, even while older plans are still in flight.
"""

from __future__ import annotations

from collections import deque

import msgspec

from shardray.runtime.engine.limits import SchedulerLimits
from shardray.runtime.engine.lookup import PromptLookup
from shardray.runtime.engine.open_plan import Drafting, OpenPlan
from shardray.runtime.engine.request import EngineRequest, EngineStats, FieldError, FinishReason, TokenOutput
from shardray.runtime.engine.sequence import Sequence, SequenceQueue
from shardray.runtime.engine.sequence_pages import SequencePages
from shardray.runtime.engine.step import NOT_FINITE, UNCONSTRAINED, Sampled, StepPlan, StepResult

_NO_TOKEN = {
    NOT_FINITE: "the model's logits are not numbers; serve it in bfloat16 or float32 if this is float16, or check its "
    "weights",
    UNCONSTRAINED: "the constraint became too complex to be kept; simplify it, or see the log of the host that samples",
}

# Where streams fill a step, a drafted token takes the time of one that is sure: it has to be nearly so itself.
_RIGHT_IN_FULL_STEP = 8


class Scheduler:
    """Turns requests into step plans, and step results into published tokens. Not thread-safe."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._pages = SequencePages(limits)
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._live: dict[str, Sequence] = {}  # by request id; each is either waiting or running
        self._waiting = SequenceQueue()
        self._running = SequenceQueue()
        self._in_flight: deque[OpenPlan] = deque()
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether requests are live or results are due."""
        return bool(self._live or self._in_flight)

    def add(self, request: EngineRequest) -> TokenOutput | None:
        """Queue a request; returns its end at once if the tokens it has already generated complete it.

        Raises FieldError if the request could never run or its id is in use.
        """
        self._limits.check(request)
        if request.request_id in self._live:
            raise FieldError("request_id", f"{request.request_id!r} is already in use")
        params, given_ids = request.params, self._limits.given_ids(request)
        searches, encoder = params.num_beams > 1, self._limits.encoder
        token_ids = [*given_ids, *(() if searches else request.generated_ids)]
        encoder_ids = request.prompt_ids if encoder is not None else ()
        drafts = self._limits.max_draft_tokens and not (params.penalizes or searches)
        sequence = Sequence(
            request=request,
            urgency=(-request.priority, -self._num_arrivals),
            stop_ids=frozenset(params.stop_token_ids).union(() if params.ignore_eos else self._limits.eos_token_ids),
            max_len=self._limits.max_len(request),
            token_ids=token_ids,
            num_given=len(given_ids),
            num_beams=params.num_beams,
            encoder_ids=encoder_ids,
            num_forced=0 if encoder is None else len(given_ids) - len(encoder.start_ids),
            is_plain=params.is_plain,
            lookup=PromptLookup(token_ids) if drafts else None,
            num_prompt_blocks=0 if request.pooling is not None else self._pages.pool.pages_for(len(encoder_ids)),
        )
        if request.pooling is None and (reason := sequence.finish_reason()):
            return TokenOutput(request.request_id, finish_reason=reason)
        self._num_arrivals += 1
        self._live[request.request_id] = sequence
        self._waiting.add(sequence)
        return None

    def cancel(self, request_id: str) -> TokenOutput | None:
        """End a request and free its pages at once; returns its end, or None if it is not live."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        self._finish(sequence)
        return TokenOutput(request_id, finish_reason=FinishReason.ABORTED)

    def forget_prefixes(self) -> None:
        """What was computed so far is shared with no request to come."""
        self._pages.pool.forget_prefixes()

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can run before a plan in flight is committed or a request arrives."""
        if len(self._in_flight) >= self._limits.max_in_flight:
            return None
        plan = OpenPlan(self._num_steps, self._drafting())
        chosen, budget = self._choose_running(0 if plan.drafting.num_tokens else self._limits.lookahead)
        for sequence, num_tokens in chosen:
            if sequence.slot is not None:  # else it was just preempted for a more urgent one
                room = self._make_room(sequence)
                self._schedule(plan, sequence, min(num_tokens, room), room - num_tokens)
        if not plan.num_drafted:  # else whoever waits was just preempted
            self._admit(plan, budget)
        if not plan.rows and not plan.encoder_rows:
            return None
        self._num_steps += 1
        self._in_flight.append(plan)
        return plan.close()

    def commit(self, result: StepResult) -> list[TokenOutput]:
        """Take the tokens of the oldest plan in flight; returns those to publish, in the plan's order."""
        plan = self._in_flight.popleft()
        if result.step != plan.step:
            raise ValueError(f"the result of step {result.step} came when that of step {plan.step} was due")
        outputs = []
        num_read = 0
        for sequence, drafted_ids, num_sampled in plan.sampling:
            sampled = result.sampled[num_read : num_read + num_sampled]
            num_read += len(sampled)
            sequence.num_unresolved -= 1
            if sequence.finished:  # cancelled, or stopped by a token that was unresolved when this step was planned
                continue
            if sequence.num_beams > 1:
                outputs += self._search(sequence, sampled)
                continue
            taken = sequence.resolve(sampled, drafted_ids)
            if drafted_ids:
                self._num_drafted_tokens += len(drafted_ids)
                self._num_accepted_tokens += len(taken) - 1
                outputs += [self._publish(sequence, one, None) for one in taken[:-1]]
            outputs += [self._publish(sequence, one, sequence.finish_reason()) for one in taken[-1:]]
        if num_read != len(result.sampled):
            raise ValueError(f"step {plan.step} yields {num_read} tokens, and its result has {len(result.sampled)}")
        outputs += self._commit_embeddings(plan, result)
        return plan.with_steps(outputs, result)

    def _search(self, sequence: Sequence, sampled: tuple[Sampled, ...]) -> list[TokenOutput]:
        """Take the candidates of its beams; all that was found once its search is over, and nothing before."""
        branches = sequence.branches
        if branches is None:  # preempted meanwhile: it begins again
            return []
        if any(one.token_id < 0 or not one.top_logprobs for one in sampled):
            return [self._publish(sequence, Sampled(NOT_FINITE), None)]
        branches.search.advance([one.top_logprobs for one in sampled])
        if not branches.search.is_over:
            self._pages.follow(sequence, branches)
            return []
        found = branches.search.best
        outputs = [self._publish(sequence, *token) for token in sequence.take_found(found)]
        if not outputs:  # an earlier mesh had sent them all
            self._finish(sequence)
            outputs = [TokenOutput(sequence.request.request_id, finish_reason=found.reason)]
        return outputs

    def _publish(self, sequence: Sequence, sampled: Sampled, reason: FinishReason | None) -> TokenOutput:
        """A new token of a live sequence, which ends with it if there is a reason."""
        request_id = sequence.request.request_id
        if sampled.token_id < 0:
            self._finish(sequence)
            return TokenOutput(request_id, finish_reason=FinishReason.ERROR, error=_NO_TOKEN[sampled.token_id])
        self._num_output_tokens += 1
        if reason is not None:
            self._finish(sequence)
        output = TokenOutput(request_id, sampled.token_id, sampled.logprob, sampled.top_logprobs, reason)
        if sequence.num_generated != 1:
            return output
        self._num_prompt_tokens += len(sequence.request.prompt_ids)
        return msgspec.structs.replace(output, num_cached_prompt_tokens=sequence.num_found)

    def _commit_embeddings(self, plan: OpenPlan, result: StepResult) -> list[TokenOutput]:
        outputs = []
        for sequence, embedding in zip(plan.pooling, result.embeddings, strict=True):
            sequence.num_unresolved -= 1
            if not sequence.finished:
                self._num_prompt_tokens += len(sequence.encoder_ids)
                self._finish(sequence)
                request_id = sequence.request.request_id
                outputs.append(TokenOutput(request_id, finish_reason=FinishReason.STOP, embedding=embedding))
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot; times are the step loop's to add."""
        pages = self._pages
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pages=pages.pool.num_pages,
            num_used_pages=pages.pool.num_used,
            num_cached_tokens=pages.num_held_tokens(self._running),
            block_size=pages.pool.block_size,
            max_model_len=self._limits.max_model_len,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_prefix_queries=pages.num_prefix_queries,
            num_prefix_hits=pages.num_prefix_hits,
        )

    def check_idle(self) -> None:
        """Raise RuntimeError if a page or a slot is held while no request is live. Costs nothing."""
        num_pages, num_slots = self._pages.pool.num_used, self._limits.max_num_seqs - len(self._free_slots)
        if num_pages or num_slots:
            raise RuntimeError(f"{num_pages} pages and {num_slots} slots are held, but no request is live")

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page and every slot has exactly the holders it is counted to have.

        For tests: it looks at every page.
        """
        held = (page for sequence in self._running for pages in sequence.held_pages for page in pages)
        self._pages.pool.check_integrity(held)
        slots = sorted([*self._free_slots, *(slot for sequence in self._running for slot in sequence.slots)])
        if slots != list(range(self._limits.max_num_seqs)):
            raise RuntimeError(f"slots free or held: {slots}, expected 0 to {self._limits.max_num_seqs - 1} once each")

    def _drafting(self) -> Drafting:
        """What the next plan may have of drafted tokens: none if it may read a prompt.

        They stand behind tokens that are known: all sequences then wait for what is in flight, and stay in one plan.
        """
        limits = self._limits
        if not limits.max_draft_tokens:
            return Drafting(0, 0)
        num_rows = sum(sequence.num_beams for sequence in self._running)
        most = min(limits.max_drafting_step, limits.max_num_batched_tokens) - num_rows
        fewest_right = _RIGHT_IN_FULL_STEP * num_rows // limits.max_drafting_step
        if most <= 0 or (self._waiting and self._free_slots):
            return Drafting(0, fewest_right)
        reads = any(sequence.num_uncomputed > 1 for sequence in self._running)
        drafts = any(sequence.is_sure(fewest_right) for sequence in self._running)
        return Drafting(most if drafts and not reads else 0, fewest_right)

    def _choose_running(self, lookahead: int) -> tuple[list[tuple[Sequence, int]], int]:
        """(sequence, tokens) for what runs on, the most urgent first, and the prefill budget that is left."""
        decodes = self._choose_decodes(lookahead)
        chosen = [(sequence, 1) for sequence in decodes]
        reading = [sequence for sequence in self._running if sequence.num_uncomputed > 1]
        num_readers = len(reading) + min(len(self._waiting), len(self._free_slots))
        num_rows = sum(sequence.num_beams for sequence in decodes)
        budget = self._limits.prefill_budget(num_rows, num_readers / max(1, len(self._running) - len(reading)))
        for sequence in reading:
            if budget:
                num_tokens = min(sequence.num_uncomputed, budget)
                budget -= num_tokens
                chosen.append((sequence, num_tokens))
        chosen.sort(key=lambda choice: choice[0].urgency, reverse=True)
        return chosen, budget

    def _choose_decodes(self, lookahead: int) -> list[Sequence]:
        """Sequences to decode; with several lanes an equal share of the running ones, those that waited longest."""
        ready = [sequence for sequence in self._running if sequence.can_decode(lookahead)]
        if ready and ready[-1] is self._running.last and not self._pages.room(ready[-1]):
            ready.pop()  # it has nobody to preempt, and must not take the place of one that can run
        share = -(-len(self._running) // self._limits.num_lanes)
        if len(ready) > share:
            ready.sort(key=lambda sequence: sequence.last_step)
        return ready[:share]

    def _admit(self, plan: OpenPlan, budget: int) -> None:
        """Start waiting sequences in their order, as far as slots, budget and pages go. Never preempts."""
        num_spare = self._pages.num_spare(self._running) if self._waiting and self._free_slots else 0
        room = self._limits.max_num_batched_tokens - plan.num_tokens if self._limits.encoder is not None else 0
        while budget > 0 and self._waiting and self._free_slots:
            sequence = self._waiting.first
            num_beams = sequence.num_beams
            if sequence.num_unresolved or len(sequence.encoder_ids) > room or num_beams > len(self._free_slots):
                return
            start = self._pages.find(sequence)
            if start.num_pages + num_beams - 1 > num_spare:
                return
            self._waiting.remove(sequence)
            self._running.add(sequence)
            plan.starts.append(sequence.start([self._free_slots.pop() for _ in range(num_beams)]))
            num_spare -= start.num_pages + num_beams
            plan.add_grant(self._pages.adopt(sequence, start))
            if sequence.encoder_ids:
                self._encode(plan, sequence)
                room -= len(sequence.encoder_ids)
                budget -= len(sequence.encoder_ids)
                continue
            num_tokens = min(sequence.num_uncomputed, budget)
            self._schedule(plan, sequence, num_tokens)
            budget -= num_tokens

    def _encode(self, plan: OpenPlan, sequence: Sequence) -> None:
        """Put a prompt for the encoder into the plan, with its pages. The decoder's tokens follow in the next ones."""
        plan.add_grant(self._pages.take(sequence, 0))
        plan.add_encoder_row(sequence, sequence.encode())

    def _make_room(self, sequence: Sequence) -> int:
        """Room for a running sequence; while it has none, the least urgent one is preempted.

        If that is this one itself, it keeps what it has and sits the step out. So the most urgent one always runs, and
        nobody is preempted for a less urgent one.
        """
        while not (num_tokens := self._pages.room(sequence)) and self._running.last is not sequence:
            self._preempt(self._running.last)
        return num_tokens

    def _schedule(self, plan: OpenPlan, sequence: Sequence, num_tokens: int, room_to_draft: int = 0) -> None:
        """Put a sequence's next tokens into the plan, with the pages they fill; and tokens drafted behind them."""
        if num_tokens == 0:
            return
        if sequence.branches is not None and sequence.has_branched:
            branching = self._pages.branch(sequence, sequence.branches)
            plan.add_branches(sequence, sequence.advance_branches(), branching)
            return
        drafting = plan.drafting
        drafted_ids: tuple[int, ...] = ()
        if drafting.num_tokens:
            most = min(self._limits.max_draft_tokens, room_to_draft, drafting.num_tokens)
            drafted_ids = sequence.draft(most, drafting.fewest_right)
            drafting.num_tokens -= len(drafted_ids)
        plan.add_grant(self._pages.take(sequence, num_tokens + len(drafted_ids)))
        plan.add_row(sequence, sequence.advance(num_tokens, drafted_ids))
        self._pages.add_prefix(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its old place in the queue; once its tokens in flight have come, it is computed again with them."""
        self._num_preemptions += 1
        self._vacate(sequence)
        self._waiting.add(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        del self._live[sequence.request.request_id]
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Take a running sequence's slot and pages back."""
        assert sequence.slot is not None
        self._running.remove(sequence)
        self._free_slots += sequence.slots
        self._pages.give_back(sequence)
        sequence.reset()
