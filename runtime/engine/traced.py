"""What a step took, told with the tokens of traced requests. Times are of the calendar, by each machine's clock."""

from __future__ import annotations

import msgspec


class StageTime(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One stage's part of a step, on its first tensor rank: from the moment when its input was there."""

    begin_ns: int  # since 1970
    duration_ns: int


class TracedStep(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A step that a traced request took part in."""

    step: int
    begin_ns: int  # since 1970: when it was planned
    duration_ns: int  # until its tokens came; with steps in flight that includes the wait for those before it
    num_tokens: int  # of the request
    num_batched_tokens: int  # of all requests
    stages: tuple[StageTime, ...]
