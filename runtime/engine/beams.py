"""Beam search: which texts of a request are followed further, and which of those that have ended is the best.

The rules are those of ``transformers`` (``generate`` with ``num_beams`` and without sampling). Knows nothing of slots,
pages, plans or models: it is given log probabilities, and tells which beams go on from which.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from shardray.runtime.engine.request import FinishReason, SamplingParams

Candidates = Sequence[tuple[int, float]]  # (token id, log probability)


class Beam(NamedTuple):
    """A text that goes on."""

    token_ids: tuple[int, ...]  # generated
    score: float  # the sum of their log probabilities
    parent: int  # the place, among the beams one token ago, of the one that it continues


class Hypothesis(NamedTuple):
    """A text that has ended."""

    token_ids: tuple[int, ...]
    score: float  # with the length penalty
    reason: FinishReason


class BeamSearch:
    """``num_beams`` texts, which grow by one token at a time.

    A text's score is the sum of the log probabilities of its tokens, over its length to the power of
    ``length_penalty``. ``max_tokens``: at most that the context window leaves. ``num_forced``: tokens that a decoder
    behind an encoder was made to begin with; they count for the length.
    """

    def __init__(self, params: SamplingParams, stop_ids: Collection[int], max_tokens: int, num_forced: int = 0) -> None:
        self._params = params
        self._stop_ids = stop_ids
        self._max_tokens = max_tokens
        self._num_forced = num_forced
        self.beams = [Beam((), 0.0, 0)]  # the best first; only one before the first token
        self.ended: list[Hypothesis] = []  # the best first, at most num_beams
        self.is_over = False

    @property
    def best(self) -> Hypothesis:
        """The answer, once the search is over."""
        return self.ended[0]

    def advance(self, candidates: Sequence[Candidates]) -> None:
        """Take the next token: of each beam its best candidates, at least ``num_candidates`` where there are as many.

        None of them may be barred. Those that end a text do so only if they are among the ``num_beams`` best of all.
        """
        num_tokens, num_beams = len(self.beams[0].token_ids) + 1, self._params.num_beams
        ranked = sorted(
            ((beam.score + logprob, parent, token_id)
             for parent, (beam, own) in enumerate(zip(self.beams, candidates, strict=True))
             for token_id, logprob in own),
            key=lambda candidate: -candidate[0],
        )  # fmt: skip
        is_last, beams = num_tokens == self._max_tokens, list[Beam]()
        for rank, (score, parent, token_id) in enumerate(ranked):
            stops = token_id in self._stop_ids
            if stops or is_last:
                if rank < num_beams:
                    reason = FinishReason.STOP if stops else FinishReason.LENGTH
                    self._end((*self.beams[parent].token_ids, token_id), score, reason)
            elif len(beams) < num_beams:
                beams.append(Beam((*self.beams[parent].token_ids, token_id), score, parent))
        self.beams = beams
        self.is_over = is_last or not beams or self._is_settled(num_tokens)

    def _end(self, token_ids: tuple[int, ...], score: float, reason: FinishReason) -> None:
        self.ended.append(Hypothesis(token_ids, score / self._weight(len(token_ids)), reason))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)  # the earlier first among equals
        del self.ended[self._params.num_beams :]

    def _is_settled(self, num_tokens: int) -> bool:
        """Whether as many texts as wanted have ended, and none that goes on promises a better score as it is now."""
        if len(self.ended) < self._params.num_beams:
            return False
        return self._params.early_stopping or self.beams[0].score / self._weight(num_tokens) <= self.ended[-1].score

    def _weight(self, num_tokens: int) -> float:
        return float((num_tokens + self._num_forced) ** self._params.length_penalty)


def num_candidates(num_beams: int, num_stop_ids: int) -> int:
    """How many candidates of each beam a search needs: the best that go on are among them, whatever ends the text."""
    return num_beams + num_stop_ids
