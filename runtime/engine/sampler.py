"""Turns logits into tokens: each row by the sampling parameters of its slot.

A row's result is a function of its logits, its parameters, the tokens it has seen and its position. It never depends on
the other rows of a batch, to the bit. Order and meaning of the processing are those of ``transformers`` (see
``SamplingParams``), and logprobs are what its ``compute_transition_scores`` reports over the processed scores.

Knows nothing of when a request ends: stop ids and lengths are the scheduler's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from shardray.runtime.engine.beams import num_candidates
from shardray.runtime.engine.constraints import Constraints, Drafted, Instead
from shardray.runtime.engine.inputs import to_device
from shardray.runtime.engine.noise import hash_token_ids, noise_key
from shardray.runtime.engine.penalties import SeenTokens
from shardray.runtime.engine.race import Choice, choose_at_random, choose_greedily
from shardray.runtime.engine.step import Sampled, SlotStart

_MAX_TOP_LOGPROBS = 20  # the most that SamplingParams takes; always found, so that ties do not depend on the batch
_NOTHING: Drafted = {}
_NONE: Instead = {}


class _Slot:
    """What the sampler keeps of the request in a slot."""

    def __init__(self, start: SlotStart, eos_token_ids: Collection[int]) -> None:
        self.slot = start.slot
        self.params = start.params
        self.constraint = start.params.constraint
        self.num_barred = start.params.min_tokens - start.num_generated  # tokens for which stopping is still barred
        self.barred_ids = sorted({*eos_token_ids, *start.params.stop_token_ids})
        self.searches = start.params.num_beams > 1
        self.num_candidates = num_candidates(start.params.num_beams, len(self.barred_ids))


class _Logprobs(NamedTuple):
    """Of some rows of a batch, which want up to ``limits`` of the best ones beside the winner's."""

    rows: Sequence[int]
    limits: Sequence[int]
    won: torch.Tensor  # (n,)
    best: torch.Tensor  # (n, at most 20); as are their ``token_ids``
    token_ids: torch.Tensor


class Draw(NamedTuple):
    """The tokens of a batch, (num_rows,) int64, and the logprobs that were asked for; all still on the device.

    NOT_FINITE where the logits are not. ``instead``: why rows have none, as far as their constraints are the reason.
    """

    tokens: torch.Tensor
    logprobs: Sequence[_Logprobs] = ()
    instead: Instead = _NONE

    def tensors(self) -> list[torch.Tensor]:
        """What ``read`` needs on the host."""
        return [self.tokens, *(tensor for found in self.logprobs for tensor in found[2:])]

    def read(self, tensors: Sequence[torch.Tensor]) -> list[Sampled]:
        """What was drawn. ``tensors``: as ``tensors`` gives them, on the host."""
        sampled = [Sampled(token_id) for token_id in tensors[0].tolist()]
        for found, place in zip(self.logprobs, range(1, len(tensors), 3), strict=True):
            won, best, token_ids = (tensor.tolist() for tensor in tensors[place : place + 3])
            for i, (row, limit) in enumerate(zip(found.rows, found.limits, strict=True)):
                ranked = sorted(zip(token_ids[i], best[i], strict=True), key=lambda pair: (-pair[1], pair[0]))
                top = tuple(pair for pair in ranked if math.isfinite(pair[1]))[:limit]
                sampled[row] = Sampled(sampled[row].token_id, won[i], top)
        for row, reason in self.instead.items():
            sampled[row] = Sampled(reason)
        return sampled


class Sampler:
    """Samples one token for each row of logits.

    ``eos_token_ids`` are the ids that ``min_tokens`` bars besides a request's own stop ids. ``num_threads``: that it
    may use on a CPU. ``constraints``: for requests that have one.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: Collection[int], device: torch.device, num_threads: int = 1,
        constraints: Constraints | None = None,
    ) -> None:  # fmt: skip
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._num_threads = num_threads
        self._constraints = constraints
        self._slots: dict[int, _Slot] = {}
        self._seen = SeenTokens(device)
        self._hashed_ids = hash_token_ids(torch.arange(vocab_size, device=device))  # (vocab_size,)

    def start(self, start: SlotStart) -> None:
        """A request takes a slot, anew or again after a preemption; whatever the slot held is forgotten."""
        self._slots[start.slot] = state = _Slot(start, self._eos_token_ids)
        if state.constraint is not None:
            self._kept.start(start.slot, state.constraint, start.generated_ids)
        if start.params.penalizes:
            self._seen.start(start.slot, start.prompt_ids, start.generated_ids)

    def draw(self, logits: torch.Tensor, places: Sequence[tuple[int, int]], drafted: Drafted = _NOTHING) -> Draw:
        """Draw a token for each row. Waits for the device only for what it drew last in a slot with a constraint.

        ``logits``: (num_rows, vocab_size) float32 on the device, which this may change. ``places``: of each row the
        slot, and the index of the new token in its prompt + output. Only a slot whose tokens do not depend on those
        before them (no penalties, min_tokens reached) may appear several times: once more for each ``drafted`` token.
        """
        states, positions = [self._slots[slot] for slot, _ in places], [position for _, position in places]
        if beams := [row for row, state in enumerate(states) if state.searches]:
            # As in ``transformers``, what follows is done to log probabilities, and what is barred had its share.
            logits[self._index(beams)] = self._take(logits, beams).log_softmax(dim=-1)
        self._process(logits, states)
        constrained = [row for row, state in enumerate(states) if state.constraint is not None]
        instead = self._bar(logits, states, constrained, drafted) if constrained else _NONE
        choices = self._choose(logits, states, positions)
        if len(choices) == 1:  # of all rows in their order
            tokens = choices[0].tokens
        else:
            tokens = torch.zeros(len(states), dtype=torch.int64, device=self._device)
            for choice in choices:
                tokens[self._index(choice.rows)] = choice.tokens
        self._advance(states, tokens, instead)
        if constrained:  # of a slot that comes several times the first row, last here
            rows = {states[row].slot: row for row in reversed(constrained) if row not in instead}
            self._kept.drawn(rows, tokens, drafted)
        found = [own for choice in choices if (own := self._logprobs(choice, states))]
        return Draw(tokens, [*found, *self._candidates(logits, beams, states)], instead)

    @property
    def _kept(self) -> Constraints:
        if self._constraints is None:
            raise RuntimeError("this sampler was made for requests without constraints")
        return self._constraints

    def _process(self, logits: torch.Tensor, states: Sequence[_Slot]) -> None:
        """Logit bias, penalties and min_tokens, in place."""
        biased = [(row, *item) for row, state in enumerate(states) for item in state.params.logit_bias.items()]
        if biased:
            rows, token_ids, biases = zip(*biased, strict=True)
            logits[self._index(rows), self._index(token_ids)] += to_device(biases, self._device, torch.float32)
        penalized = [row for row, state in enumerate(states) if state.params.penalizes]
        if penalized:
            slots = [states[row].slot for row in penalized]
            self._seen.penalize(logits, penalized, slots, [states[row].params for row in penalized])
        barred = [(row, i) for row, state in enumerate(states) if state.num_barred > 0 for i in state.barred_ids]
        if barred:
            rows, token_ids = zip(*barred, strict=True)
            logits[self._index(rows), self._index(token_ids)] = -torch.inf

    def _bar(self, logits: torch.Tensor, states: Sequence[_Slot], rows: Sequence[int], drafted: Drafted) -> Instead:
        """What the constraints of these rows leave no place for, in place; the rows of which that cannot be told."""
        barred, instead = self._kept.barred([states[row].slot for row in rows], drafted)
        own = self._take(logits, rows).masked_fill_(to_device(barred, self._device), -torch.inf)
        if own is not logits:
            logits[self._index(rows)] = own
        return {rows[row]: reason for row, reason in instead.items()}

    def _choose(self, logits: torch.Tensor, states: Sequence[_Slot], positions: Sequence[int]) -> list[Choice]:
        greedy = [row for row, state in enumerate(states) if state.params.greedy]
        others = [row for row, state in enumerate(states) if not state.params.greedy]
        choices = []
        if greedy:
            choices.append(choose_greedily(self._take(logits, greedy), greedy))
        if others:
            params = [states[row].params for row in others]
            keys = [noise_key(states[row].params.seed or 0, positions[row]) for row in others]
            scores = self._take(logits, others)
            choices += choose_at_random(scores, others, params, keys, self._hashed_ids, self._num_threads)
        return choices

    def _advance(self, states: Sequence[_Slot], tokens: torch.Tensor, instead: Instead) -> None:
        """Count the tokens for what depends on them: min_tokens and the penalties."""
        for state in states:
            state.num_barred -= state.num_barred > 0
        penalized = [row for row, state in enumerate(states) if state.params.penalizes and row not in instead]
        if penalized:
            self._seen.add([states[row].slot for row in penalized], self._take(tokens, penalized).clamp_min(0))

    def _logprobs(self, choice: Choice, states: Sequence[_Slot]) -> _Logprobs | None:
        """The winner's logprob and the best ones, of the rows that want any."""
        limits = [states[row].params.logprobs for row in choice.rows]
        wanted = [i for i, limit in enumerate(limits) if limit is not None]
        if not wanted:
            return None
        logprobs = self._take(choice.scores, wanted).log_softmax(dim=-1)  # (num_wanted, width)
        won = logprobs.gather(1, self._take(choice.columns, wanted)[:, None]).view(-1)
        most = min(_MAX_TOP_LOGPROBS, logprobs.shape[1]) if any(limits) else 0
        best, columns = logprobs.topk(most, dim=-1)
        token_ids = columns if choice.token_ids is None else self._take(choice.token_ids, wanted).gather(1, columns)
        return _Logprobs([choice.rows[i] for i in wanted], [limits[i] or 0 for i in wanted], won, best, token_ids)

    def _candidates(self, logprobs: torch.Tensor, beams: Sequence[int], states: Sequence[_Slot]) -> Iterator[_Logprobs]:
        """What searches go on with, of the rows that are beams. A row's do not depend on what others need."""
        for count in sorted({states[row].num_candidates for row in beams}):
            rows = [row for row in beams if states[row].num_candidates == count]
            best, token_ids = self._take(logprobs, rows).topk(min(count, logprobs.shape[1]), dim=-1)
            yield _Logprobs(rows, [count] * len(rows), best[:, 0], best, token_ids)

    def _take(self, of_rows: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return of_rows if len(rows) == len(of_rows) else of_rows[self._index(rows)]

    def _index(self, ids: Sequence[int]) -> torch.Tensor:
        return to_device(ids, self._device, torch.int64)
