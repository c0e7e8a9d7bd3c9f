"""One request inside the scheduler: its tokens, how far they are computed, and the pages and slot it holds."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from shardray.runtime.engine.beams import BeamSearch, Hypothesis
from shardray.runtime.engine.branches import Branch, Branches
from shardray.runtime.engine.lookup import PromptLookup
from shardray.runtime.engine.prefixes import UNKNOWN, Prefix
from shardray.runtime.engine.request import EngineRequest, FinishReason
from shardray.runtime.engine.step import NOT_YET, EncoderRow, PageGrant, Row, Sampled, SlotStart
from shardray.runtime.engine.traced import TracedStep


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request.

    Tokens come in three kinds, in this order: computed (a plan that is made covers them), known but not yet computed,
    and unresolved (a plan in flight samples them). Once the prompt is computed there is always exactly one token to
    compute next, be it known or unresolved. A plan may compute drafted tokens as well: they count as computed until it
    is known which of them are right, and the sequence is in no other plan meanwhile.

    With an encoder the prompt is none of these tokens: it is read whole, before all of them, and has the first pages.

    Of a request that searches, ``token_ids`` and ``pages`` are those of its best beam, and all beams are as long; a
    plan has a row for each, and its next one waits for the result. Preempted, it begins again behind the given tokens.
    """

    request: EngineRequest
    urgency: tuple[int, int]  # the greater is served first
    stop_ids: frozenset[int]
    max_len: int  # tokens, prompt included, at which the sequence ends
    token_ids: list[int]  # those known of what comes before the generated ones, and of these
    num_given: int  # tokens before the generated ones
    num_beams: int = 1  # slots that it takes, and rows that it has at most in a plan
    encoder_ids: tuple[int, ...] = ()  # what an encoder reads
    num_forced: int = 0  # of the tokens that a decoder behind it is given, those that the request or the model chose
    num_prompt_blocks: int = 0  # pages that hold what the decoder attends to of it
    is_plain: bool = False  # see SamplingParams
    lookup: PromptLookup | None = None  # what drafts tokens; None: nothing does
    awaits_constraint: bool = False  # until its first token since it started: whoever samples may not have compiled it
    is_encoded: bool = False  # a plan that is made reads it
    num_computed: int = 0
    num_unresolved: int = 0
    slot: int | None = None  # held while running
    pages: list[int] = field(default_factory=list)
    branches: Branches | None = None  # of a request that searches, while running
    prefix: Prefix = UNKNOWN  # of it, what others can find
    num_found: int = 0  # tokens that were found computed when it started first
    last_step: int = -1  # the last plan it was in
    finished: bool = False
    untold_steps: list[TracedStep] = field(default_factory=list)  # of a traced request, since its last output

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_given

    @property
    def has_branched(self) -> bool:
        """Whether its beams have rows of their own."""
        return self.branches is not None and self.num_generated > 0

    @property
    def slots(self) -> list[int]:
        """All that it holds."""
        if self.branches is not None:
            return self.branches.slots
        return [] if self.slot is None else [self.slot]

    @property
    def held_pages(self) -> list[list[int]]:
        """Of each of its beams, or its own."""
        return [self.pages] if self.branches is None else self.branches.pages

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are held, those of an encoded prompt included."""
        return self.num_computed + (len(self.encoder_ids) if self.is_encoded and self.num_prompt_blocks else 0)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) + self.num_unresolved - self.num_computed

    def can_decode(self, lookahead: int) -> bool:
        """Whether its one next token may be planned, and the token sampled from it would be within the length limit."""
        if self.num_unresolved > (0 if self.branches is not None or self.awaits_constraint else lookahead):
            return False
        return self.num_uncomputed == 1 and self.num_computed + 1 < self.max_len

    @property
    def is_greedy(self) -> bool:
        """Whether of the token that the last plan samples the highest logit is all that matters."""
        return self.is_plain and self.num_generated + self.num_unresolved > self.request.params.min_tokens

    def is_sure(self, fewest_right: int) -> bool:
        """Whether it has tokens to draft behind those that are known: see PromptLookup."""
        return self.lookup is not None and self.lookup.is_sure(fewest_right)

    def draft(self, most: int, fewest_right: int) -> tuple[int, ...]:
        """Up to ``most`` tokens to stand behind those that are known, in a plan that computes all of these.

        Not before a token sampled behind them depends on no more than its position: not on ``min_tokens``, nor on what
        penalties would have counted.
        """
        lookup, fewest_generated = self.lookup, max(1, self.request.params.min_tokens)
        if lookup is None or not lookup.is_sure(fewest_right) or self.num_generated < fewest_generated:
            return ()
        if self.num_unresolved or self.num_uncomputed != 1 or self.awaits_constraint:
            return ()
        return lookup.draft(min(most, self.max_len - len(self.token_ids) - 1))

    def start(self, slots: list[int]) -> SlotStart:
        """Take slots, one for each beam; the first begins."""
        self.slot, *others = slots
        self.awaits_constraint = self.request.params.constraint is not None
        if self.num_beams > 1:
            self.branches = Branches(self._new_search(), others, [Branch(self.slot, self.pages)])
        return self.slot_start(self.slot, tuple(self.token_ids[self.num_given :]))

    def slot_start(self, slot: int, generated_ids: tuple[int, ...]) -> SlotStart:
        """A slot begins behind these tokens. Ids travel only when the sampler needs them."""
        params, num_generated = self.request.params, len(generated_ids)
        given_ids = tuple(self.token_ids[: self.num_given]) if params.penalizes else ()
        seen_ids = generated_ids if params.penalizes or params.constraint else ()
        prompt_len = len(self.encoder_ids) if self.num_prompt_blocks else 0
        return SlotStart(slot, params, given_ids, seen_ids, num_generated, prompt_len)

    def encode(self) -> EncoderRow:
        """The prompt as a row for the encoder; one that is pooled yields its embedding."""
        assert self.slot is not None
        self.is_encoded = True
        self.num_unresolved += self.request.pooling is not None
        return EncoderRow(self.slot, self.encoder_ids, self.request.pooling)

    def grant(self, pages: list[int]) -> PageGrant:
        """Append pages."""
        assert self.slot is not None
        first_block = len(self.pages)
        self.pages += pages
        return PageGrant(self.slot, first_block, tuple(pages))

    def adopt(self, prefix: Prefix, pages: list[int], num_tokens: int) -> PageGrant | None:
        """Begin behind the ``num_tokens`` tokens of a prefix, computed by others."""
        if self.last_step < 0:  # after a preemption it finds what it has computed itself
            self.num_found = num_tokens
        self.prefix, self.num_computed = prefix, num_tokens
        return self.grant(pages) if pages else None

    def advance(self, num_tokens: int, drafted_ids: tuple[int, ...] = ()) -> Row:
        """The next ``num_tokens`` tokens as a row, with those drafted behind them.

        It samples if they are all there is to compute.
        """
        assert self.slot is not None
        start = self.num_computed
        samples = num_tokens == self.num_uncomputed
        self.num_computed += num_tokens + len(drafted_ids)
        self.num_unresolved += samples
        # An unresolved token lies past the known ones: the slice is then empty, as the row of such a token is to be.
        token_ids = tuple(self.token_ids[start : start + num_tokens]) + drafted_ids
        return Row(self.slot, start, token_ids, samples, len(drafted_ids))

    def advance_branches(self) -> list[Row]:
        """The next token of each beam as a row, which samples."""
        assert self.branches is not None
        start = self.num_computed
        self.num_computed += 1
        self.num_unresolved += 1
        pairs = zip(self.branches.search.beams, self.branches.held, strict=True)
        return [Row(branch.slot, start, beam.token_ids[-1:], samples=True) for beam, branch in pairs]

    def follow(self, branches: Branches) -> list[int]:
        """Become what its search has found likely; the pages that are to be let go of."""
        left = branches.follow()
        self.token_ids[self.num_given :] = branches.search.beams[0].token_ids
        self.pages = branches.held[0].pages
        return left

    def take_found(self, found: Hypothesis) -> Iterator[tuple[Sampled, FinishReason | None]]:
        """Take what its search has found, one by one, but for what was sent before; the last one with the reason."""
        self.token_ids[self.num_given :] = self.request.generated_ids
        for token_id in found.token_ids[self.num_generated :]:
            self.token_ids.append(token_id)
            yield Sampled(token_id), found.reason if self.num_generated == len(found.token_ids) else None

    def resolve(self, sampled: tuple[Sampled, ...], drafted_ids: tuple[int, ...]) -> tuple[Sampled, ...]:
        """Take of what a plan sampled, one token and one behind each drafted one, what is good; returns that.

        The first is, and each behind a drafted token that is the one sampled before it; none behind the sequence's end,
        or behind logits that are not finite. None at all of a row that is to be run again.
        """
        if sampled[0].token_id == NOT_YET:
            self.num_computed = min(self.num_computed, len(self.token_ids) - 1)
            return ()
        self.awaits_constraint = False
        num_taken = 0
        for one in sampled:
            num_taken += 1
            if one.token_id >= 0:
                self.token_ids.append(one.token_id)
            if num_taken > len(drafted_ids) or one.token_id != drafted_ids[num_taken - 1] or self.finish_reason():
                break
        if drafted_ids:  # keys and values behind a wrong one are written over; after a preemption there are none
            self.num_computed = min(self.num_computed, len(self.token_ids) - 1)
        if self.lookup is not None:
            self.lookup.read()
        return sampled[:num_taken]

    def reset(self) -> None:
        """Give up the slot and all that was computed. Tokens in flight stay due."""
        self.slot = None
        self.pages = []
        if self.branches is not None:
            self.branches = None
            del self.token_ids[self.num_given :]
        self.prefix = UNKNOWN
        self.num_computed = 0
        self.is_encoded = False

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with its last known token, or None if it goes on."""
        if self.num_generated > self.request.params.min_tokens and self.token_ids[-1] in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_len else None

    def _new_search(self) -> BeamSearch:
        return BeamSearch(self.request.params, self.stop_ids, self.max_len - self.num_given, self.num_forced)


_urgency = attrgetter("urgency")


class SequenceQueue:
    """Sequences, the most urgent first. Kept sorted with the most urgent last, so that taking it moves nothing."""

    __slots__ = ("_sequences",)

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    @property
    def first(self) -> Sequence:
        return self._sequences[-1]

    @property
    def last(self) -> Sequence:
        return self._sequences[0]

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_urgency)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[bisect_left(self._sequences, sequence.urgency, key=_urgency)]
