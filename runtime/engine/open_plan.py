"""A plan in the making: what of which sequences is in it, until it is sent, and until its result has come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from shardray.runtime.engine.request import TokenOutput
from shardray.runtime.engine.sequence import Sequence
from shardray.runtime.engine.sequence_pages import Branching
from shardray.runtime.engine.step import EncoderRow, PageGrant, Row, SlotStart, StepPlan, StepResult
from shardray.runtime.engine.traced import TracedStep


@dataclass(slots=True)
class Drafting:
    """How many tokens may yet be drafted in a plan, and for which sequences (see PromptLookup)."""

    num_tokens: int
    fewest_right: int


@dataclass(slots=True)
class OpenPlan:
    """A plan, and the sequences that its result is for, in its order."""

    step: int
    drafting: Drafting
    starts: list[SlotStart] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    encoder_rows: list[EncoderRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    # With its drafted tokens, and how many tokens are sampled for it.
    sampling: list[tuple[Sequence, tuple[int, ...], int]] = field(default_factory=list)
    pooling: list[Sequence] = field(default_factory=list)  # of encoder rows that yield an embedding
    is_greedy: bool = True
    traced: list[tuple[Sequence, int]] = field(default_factory=list)  # with the tokens that each has in the plan
    begin_ns: int = 0  # since 1970; of a plan with such

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows) + sum(len(row.token_ids) for row in self.encoder_rows)

    @property
    def num_drafted(self) -> int:
        return sum(row.num_drafted for row in self.rows)

    def add_grant(self, grant: PageGrant | None) -> None:
        if grant is not None:
            self.grants.append(grant)

    def add_row(self, sequence: Sequence, row: Row) -> None:
        sequence.last_step = self.step
        self.rows.append(row)
        if sequence.request.is_traced:
            self.traced.append((sequence, row.num_tokens))
        if row.samples:
            self.sampling.append((sequence, row.drafted_ids, 1 + row.num_drafted))
            self.is_greedy &= sequence.is_greedy

    def add_branches(self, sequence: Sequence, rows: list[Row], branching: Branching) -> None:
        """The rows of a sequence's beams, and what they need."""
        sequence.last_step = self.step
        self.starts += branching.starts
        self.grants += branching.grants
        self.copies += branching.copies
        self.rows += rows
        if sequence.request.is_traced:
            self.traced.append((sequence, len(rows)))
        self.sampling.append((sequence, (), len(rows)))
        self.is_greedy = False

    def add_encoder_row(self, sequence: Sequence, row: EncoderRow) -> None:
        sequence.last_step = self.step
        self.encoder_rows.append(row)
        if sequence.request.is_traced:
            self.traced.append((sequence, len(row.token_ids)))
        if row.pooling is not None:
            self.pooling.append(sequence)

    def close(self) -> StepPlan:
        """What is sent to the ranks."""
        if self.traced:
            self.begin_ns = time.time_ns()
        return StepPlan(
            step=self.step,
            starts=tuple(self.starts),
            grants=tuple(self.grants),
            rows=tuple(self.rows),
            encoder_rows=tuple(self.encoder_rows),
            is_greedy=self.is_greedy,
            is_traced=bool(self.traced),
            copies=tuple(self.copies),
        )

    def with_steps(self, outputs: list[TokenOutput], result: StepResult) -> list[TokenOutput]:
        """The same, and those of traced requests tell of this step and of earlier ones that gave them nothing."""
        if not self.traced:
            return outputs
        duration_ns = time.time_ns() - self.begin_ns
        untold = {}
        for sequence, num_tokens in self.traced:
            step = TracedStep(self.step, self.begin_ns, duration_ns, num_tokens, self.num_tokens, result.stages)
            sequence.untold_steps.append(step)
            untold[sequence.request.request_id] = sequence.untold_steps
        told = []
        for output in outputs:
            steps = untold.get(output.request_id, [])
            told.append(msgspec.structs.replace(output, steps=tuple(steps)) if steps else output)
            steps.clear()
        return told
