"""The comparison that chaos runs rely on finds what it is meant to find."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from shardray.runtime.engine.request import FinishReason
from tests.chaos.compare import Answer, Verdict, judge

EXPECTED = Answer(
    token_ids=[4, 8, 15, 16],
    text="4 8 15 16",
    logprobs=[(-0.1, -0.1, -3.0)] * 4,
    finish_reason=FinishReason.LENGTH,
)


def changed(**changes: object) -> Answer:
    return dataclasses.replace(copy.deepcopy(EXPECTED), **changes)  # type: ignore[arg-type]


def test_an_equal_answer_is_the_same_and_rounding_in_logprobs_is_no_change() -> None:
    rounded = [(-0.1004, -0.1004, -3.0002)] * 4
    assert judge(changed(), EXPECTED) == (Verdict.SAME, "")
    assert judge(changed(logprobs=rounded), EXPECTED) == (Verdict.SAME, "")


@pytest.mark.parametrize(
    ("changes", "verdict", "detail"),
    [
        ({"token_ids": [4, 8, 16, 16]}, Verdict.CHANGED, "token 2 of 4"),
        ({"token_ids": [4, 15, 16]}, Verdict.CHANGED, "token 1 of 4"),  # one is missing
        ({"token_ids": [4, 8, 8, 15, 16]}, Verdict.CHANGED, "token 2 of 4"),  # one came twice
        ({"token_ids": [4, 8, 15, 16, 23]}, Verdict.CHANGED, "token 4 of 4"),
        ({"text": "4 8 15 1"}, Verdict.CHANGED, "its end"),
        ({"text": "4 8 15 17"}, Verdict.CHANGED, "text"),
        ({"logprobs": [(-0.1, -0.1, -3.0)] * 3 + [(-0.2, -0.1, -3.0)]}, Verdict.CHANGED, "logprobs of token 3"),
        ({"finish_reason": FinishReason.STOP}, Verdict.CHANGED, "its end"),
        ({"token_ids": [4, 8], "finish_reason": FinishReason.LENGTH}, Verdict.LOST, "after 2 of 4 tokens"),
        ({"finish_reason": None}, Verdict.LOST, "after 4 of 4 tokens"),
        ({"error": "the server is shutting down"}, Verdict.LOST, "shutting down"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_and_told(changes: dict[str, object], verdict: Verdict, detail: str) -> None:
    found, told = judge(changed(**changes), EXPECTED)
    assert found is verdict
    assert detail in told


def test_a_stream_that_its_client_left_has_to_be_right_as_far_as_it_came() -> None:
    part = {"token_ids": [4, 8], "text": "4 8", "logprobs": EXPECTED.logprobs[:2], "finish_reason": None}
    assert judge(changed(was_left=True, **part), EXPECTED) == (Verdict.SAME, "")
    assert judge(changed(was_left=True, **{**part, "token_ids": [4, 9]}), EXPECTED)[0] is Verdict.CHANGED
