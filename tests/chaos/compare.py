"""Two answers to the same request: are they the same, token by token, logprob by logprob, letter by letter?"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from shardray.runtime.client import Delta
from shardray.runtime.engine.request import FinishReason

_LOGPROB_TOLERANCE = 1e-3  # the order of sums differs with the shape and the batch


@dataclass
class Answer:
    """What a client has of a stream, as far as it came."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[tuple[float, ...]] = field(default_factory=list)  # of each token: its own, then the highest
    finish_reason: FinishReason | None = None
    error: str | None = None
    was_left: bool = False  # by its client, before the end
    pauses: list[tuple[int, float]] = field(default_factory=list)  # long ones: before which token, how many seconds

    def add(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += [(entry.chosen.logprob, *(top.logprob for top in entry.top)) for entry in delta.logprobs]
        self.finish_reason = delta.finish_reason or self.finish_reason


class Verdict(enum.StrEnum):
    SAME = "same"
    LOST = "lost"  # it failed, or ended before its end
    CHANGED = "changed"


def judge(answer: Answer, expected: Answer) -> tuple[Verdict, str]:
    """The verdict, and what is wrong in one line. A stream that its client left is judged as far as it came."""
    pairs = zip(answer.token_ids, expected.token_ids, strict=False)
    num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    num_tokens, num_expected = len(answer.token_ids), len(expected.token_ids)
    if num_same < num_tokens:
        wrong, right = answer.token_ids[num_same : num_same + 3], expected.token_ids[num_same : num_same + 3]
        return Verdict.CHANGED, f"token {num_same} of {num_expected}: {wrong} in place of {right}"
    if place := _first_far(answer.logprobs, expected.logprobs):
        return Verdict.CHANGED, place
    if not expected.text.startswith(answer.text):
        return Verdict.CHANGED, f"text {answer.text[-40:]!r} in place of {expected.text[-40:]!r}"
    if answer.was_left:
        return Verdict.SAME, ""
    if answer.error is not None or answer.finish_reason is None or num_same < num_expected:
        why = answer.error or f"finish reason {answer.finish_reason}"
        return Verdict.LOST, f"after {num_tokens} of {num_expected} tokens: {why}"
    if (answer.text, answer.finish_reason) != (expected.text, expected.finish_reason):
        return Verdict.CHANGED, f"its end: {answer.text[-20:]!r}, {answer.finish_reason}"
    return Verdict.SAME, ""


def _first_far(values: Sequence[tuple[float, ...]], expected: Sequence[tuple[float, ...]]) -> str:
    """The first position whose logprobs are not those expected; empty if there is none."""
    for position, (own, right) in enumerate(zip(values, expected, strict=False)):
        far = max((abs(a - b) for a, b in zip(own, right, strict=False)), default=0.0)
        if len(own) != len(right) or far > _LOGPROB_TOLERANCE:
            return f"logprobs of token {position}: {own} in place of {right}"
    return ""
