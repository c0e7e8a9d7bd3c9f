"""Which pages each sequence holds: how many it needs, which of them others have filled, when they are free again.

Sequences that begin alike share the pages of their common full blocks. A page can be found as soon as the plan is made
that fills it: every rank runs plans in order, and in each layer stores the keys and values of a step before it reads
any, so the plans to come, and the rows after it in the same plan, may read it.

Beams of one request share the pages that were full when they parted, and of what an encoder made of its prompt.
"""

from __future__ import annotations

from typing import NamedTuple

from shardray.runtime.engine.branches import Branches
from shardray.runtime.engine.limits import SchedulerLimits
from shardray.runtime.engine.pages import PagePool
from shardray.runtime.engine.prefixes import Prefix
from shardray.runtime.engine.sequence import Sequence, SequenceQueue
from shardray.runtime.engine.step import PageGrant, SlotStart


class Start(NamedTuple):
    """How a sequence would start now."""

    prefix: Prefix  # what is computed already
    found: list[int]  # the pages that hold it
    num_pages: int  # that nobody holds and it would take, those of ``found`` included


class Branching(NamedTuple):
    """What a plan has to say of beams that go on."""

    starts: list[SlotStart]
    grants: list[PageGrant]
    copies: list[tuple[int, int]]  # see StepPlan


class SequencePages:
    """Hands the pages of a pool to sequences."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.pool = PagePool(limits.num_pages, limits.block_size)
        self._shares = limits.prefix_block_size > 0
        self.num_prefix_queries = 0  # tokens of sequences that started (again)
        self.num_prefix_hits = 0  # those of them that were computed already

    def find(self, sequence: Sequence) -> Start:
        """What a waiting sequence would start with; never all of its tokens, for the last one samples."""
        token_ids, size = sequence.token_ids, self.pool.block_size
        most = (len(token_ids) - 1) // size if self._shares else 0
        prefix, found = self.pool.find(sequence.request.prefix_scope, token_ids, most)
        num_more = self._pages_for(sequence, len(token_ids)) - len(found)
        return Start(prefix, found, num_more + self.pool.count_free(found))

    def adopt(self, sequence: Sequence, start: Start) -> PageGrant | None:
        """Let it begin behind what was found; None if that is nothing."""
        num_tokens = len(start.found) * self.pool.block_size
        self.num_prefix_hits += num_tokens
        self.num_prefix_queries += len(sequence.token_ids) if self._shares else 0
        for page in start.found:
            self.pool.retain(page)
        return sequence.adopt(start.prefix, start.found, num_tokens)

    def take(self, sequence: Sequence, num_tokens: int) -> PageGrant | None:
        """The pages that its next ``num_tokens`` tokens need beyond those it holds; None if there are none.

        Those of the prompt that an encoder reads come with them, or with ``num_tokens`` 0.
        """
        num_missing = self._pages_for(sequence, sequence.num_computed + num_tokens) - len(sequence.pages)
        return sequence.grant(self.pool.allocate(num_missing)) if num_missing > 0 else None

    def follow(self, sequence: Sequence, branches: Branches) -> None:
        """Let go of the pages of beams that none of those found likely continues."""
        for page in sequence.follow(branches):
            self.pool.release(page)

    def branch(self, sequence: Sequence, branches: Branches) -> Branching:
        """Give each beam the pages that it and its next token need: those that are full are shared, the last is copied.

        Room for that is there.
        """
        found = Branching([], [], [])
        num_full, is_partial = self._num_full(sequence)
        for beam, branch in zip(branches.search.beams, branches.held, strict=True):
            parent, first_block = branch.parent, len(branch.pages)
            if parent is not None or sequence.request.params.penalizes:  # the sampler is told what the beam has seen
                found.starts.append(sequence.slot_start(branch.slot, beam.token_ids))
                first_block = 0
            if parent is not None:
                branch.parent, branch.pages = None, parent.pages[:num_full]
                for page in branch.pages:
                    self.pool.retain(page)
            if parent is not None or not is_partial:
                branch.pages += self.pool.allocate(1)
            if parent is not None and is_partial:
                found.copies.append((parent.pages[num_full], branch.pages[num_full]))
            if len(branch.pages) > first_block:
                found.grants.append(PageGrant(branch.slot, first_block, tuple(branch.pages[first_block:])))
        return found

    def add_prefix(self, sequence: Sequence) -> None:
        """Let others find what the plans of a sequence have computed of the tokens that are known, and will stay."""
        num_known = len(sequence.token_ids) if sequence.num_beams == 1 else sequence.num_given
        num_known -= sequence.awaits_constraint  # the last one may be computed again
        num_blocks = min(sequence.num_computed, num_known) // self.pool.block_size
        if self._shares and num_blocks > sequence.prefix.num_blocks:
            sequence.prefix = self.pool.add_prefix(sequence.prefix, sequence.token_ids, sequence.pages, num_blocks)

    def give_back(self, sequence: Sequence) -> None:
        """Let go of all its pages."""
        self.add_prefix(sequence)
        for pages in sequence.held_pages:
            for page in reversed(pages):  # so that they are handed out in this order again
                self.pool.release(page)

    def room(self, sequence: Sequence) -> int:
        """How many more tokens fit into the pages that it holds and those that are free; of beams, at most one each."""
        if sequence.branches is not None and sequence.has_branched:
            return int(self._num_missing(sequence) <= self.pool.num_free)
        num_pages = len(sequence.pages) - sequence.num_prompt_blocks + self.pool.num_free
        return num_pages * self.pool.block_size - sequence.num_computed

    def num_spare(self, running: SequenceQueue) -> int:
        """Free pages, less those that running sequences need for the tokens they have and for one more page each.

        Admitting on less would preempt the newcomer within a few steps and compute its prompt twice.
        """
        num_owed = sum(
            max(0, self._pages_for(sequence, len(sequence.token_ids)) - len(sequence.pages)) for sequence in running
        )
        return self.pool.num_free - num_owed - sum(sequence.num_beams for sequence in running)

    def num_held_tokens(self, running: SequenceQueue) -> int:
        """Tokens whose keys and values the pages of running sequences hold; what is shared counts once."""
        size = self.pool.block_size
        num_empty = sum(len(one.pages) * size - one.num_cached for one in running)
        for one in running:
            if one.branches is not None:
                own = [len(pages) - one.num_prompt_blocks for pages in one.branches.pages[1:]]
                num_empty += sum(own) * size - len(own) * one.num_computed
        return self.pool.num_used * size - num_empty

    def _num_full(self, sequence: Sequence) -> tuple[int, bool]:
        """Pages of each of its beams that are full, and whether another one is partly so."""
        num_full, num_more = divmod(sequence.num_computed, self.pool.block_size)
        return sequence.num_prompt_blocks + num_full, num_more > 0

    def _num_missing(self, sequence: Sequence) -> int:
        """Pages that its beams need for their next tokens."""
        assert sequence.branches is not None
        _, is_partial = self._num_full(sequence)
        return sequence.branches.num_new if is_partial else len(sequence.branches.held)

    def _pages_for(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages of a sequence with that many tokens."""
        return sequence.num_prompt_blocks + self.pool.pages_for(num_tokens)
