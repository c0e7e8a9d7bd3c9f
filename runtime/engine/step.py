"""The step plan: what every rank of a mesh runs next, sent by the leader as one small frame.

Frames carry deltas: a request's sampling parameters when it takes a slot, pages when they are added, and for each row
only where it starts. A rank keeps a table of slots that these deltas fill, and no other request state.
"""

from __future__ import annotations

import msgspec

from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.engine.traced import StageTime
from shardray.runtime.model.spec import Pooling

NOT_FINITE = -1  # in place of a token: its logits are not finite; as parallel/rows.py has it
UNCONSTRAINED = -2  # its constraint cannot be kept
NOT_YET = -3  # its constraint is still being compiled: the row is to be run again


class SlotStart(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request takes a slot (again, after a preemption): forget whatever the slot held."""

    slot: int
    params: SamplingParams
    prompt_ids: tuple[int, ...]  # only if params.penalizes, else empty
    generated_ids: tuple[int, ...]  # only if params.penalizes or there is a constraint
    num_generated: int  # tokens generated before this start, for min_tokens
    prompt_len: int = 0  # tokens of what an encoder reads; the pages that hold what it makes of it are the first ones


class PageGrant(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``pages`` follow the pages the slot already has, from block ``first_block`` on."""

    slot: int
    first_block: int
    pages: tuple[int, ...]


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Consecutive tokens of one slot. Empty ``token_ids``: one token, the one that the slot sampled last."""

    slot: int
    start: int  # position of the first token = tokens whose keys and values the slot already holds
    token_ids: tuple[int, ...]
    samples: bool  # whether the last token's logits yield a new token
    num_drafted: int = 0  # of the last tokens: each yields a new one as well, good if those before it were right

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) or 1

    @property
    def drafted_ids(self) -> tuple[int, ...]:
        return self.token_ids[-self.num_drafted :] if self.num_drafted else ()

    @property
    def num_sampled(self) -> int:
        """Of the last tokens, those whose logits yield a new one."""
        return 1 + self.num_drafted if self.samples else 0


class EncoderRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A prompt that the encoder reads, all of it; for its embedding (``pooling``), or for a decoder to attend to."""

    slot: int
    token_ids: tuple[int, ...]
    pooling: Pooling | None


class StepPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One step. Every rank runs plans in ``step`` order."""

    step: int
    starts: tuple[SlotStart, ...]
    grants: tuple[PageGrant, ...]
    rows: tuple[Row, ...]
    encoder_rows: tuple[EncoderRow, ...] = ()
    is_greedy: bool = False  # the highest logit is all that matters, in every row that samples
    is_traced: bool = False  # every stage tells what it took
    copies: tuple[tuple[int, int], ...] = ()  # (page, the one that gets what it holds), before any row is run

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows) + sum(len(row.token_ids) for row in self.encoder_rows)

    @property
    def sampled(self) -> list[tuple[int, int]]:
        """(slot, position) of each token that the step yields."""
        return [
            (row.slot, row.start + row.num_tokens - back)
            for row in self.rows
            for back in range(row.num_sampled - 1, -1, -1)
        ]

    @property
    def drafted(self) -> dict[int, tuple[int, ...]]:
        """By slot, the drafted tokens of rows that have some."""
        return {row.slot: row.drafted_ids for row in self.rows if row.num_drafted}


class Sampled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One new token, or why there is none: NOT_FINITE, UNCONSTRAINED, NOT_YET."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # of a beam, the candidates of its search


class StepResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry for each token that a row samples, and one for each row with ``pooling``, in the plan's order."""

    step: int
    sampled: tuple[Sampled, ...]
    embeddings: tuple[bytes, ...] = ()  # float32, little-endian
    stages: tuple[StageTime, ...] = ()  # of a plan that is traced


_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_result_decoder = msgspec.msgpack.Decoder(StepResult)


def encode(message: StepPlan | StepResult) -> bytes:
    return _encoder.encode(message)


def decode_plan(frame: bytes) -> StepPlan:
    return _plan_decoder.decode(frame)


def decode_result(frame: bytes) -> StepResult:
    return _result_decoder.decode(frame)
