"""Turns logits into tokens: each row by the sampling parameters of its slot.

A row's result is a function of its logits, its parameters, the tokens it has seen and its position. It never depends on
the other rows of a batch, to the bit. Order and meaning of the processing are those of ``transformers`` (see
``SamplingParams``), and logprobs are what its ``compute_transition_scores`` reports over the processed scores.

Knows nothing of when a request ends: stop ids and lengths are the scheduler's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from shardray.parallel.rows import NOT_FINITE
from shardray.runtime.engine.candidates import is_filtered, survivors
from shardray.runtime.engine.inputs import to_device
from shardray.runtime.engine.noise import exponential_noise, hash_token_ids, noise_key
from shardray.runtime.engine.penalties import SeenTokens
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.engine.step import Sampled, SlotStart

_MAX_TOP_LOGPROBS = 20  # the most that SamplingParams takes; always found, so that ties do not depend on the batch
_LOWEST_TEMPERATURE = 1e-30  # a lower one would round to 0 in float32, and it makes no difference


class _Slot:
    """What the sampler keeps of the request in a slot."""

    def __init__(self, start: SlotStart, eos_token_ids: Collection[int]) -> None:
        self.slot = start.slot
        self.params = start.params
        self.num_barred = start.params.min_tokens - start.num_generated  # tokens for which stopping is still barred
        self.barred_ids = sorted({*eos_token_ids, *start.params.stop_token_ids})


class _Choice(NamedTuple):
    """The winners of some rows of a batch."""

    rows: Sequence[int]  # indices into the batch
    scores: torch.Tensor  # (n, width) processed scores, -inf where filtered
    token_ids: torch.Tensor | None  # (n, width), None if the columns are the vocabulary
    columns: torch.Tensor  # (n,) the column that won

    @property
    def tokens(self) -> torch.Tensor:
        return self.columns if self.token_ids is None else self.token_ids.gather(1, self.columns[:, None]).view(-1)


class _Logprobs(NamedTuple):
    """Of some rows of a batch, which want up to ``limits`` of the best ones beside the winner's."""

    rows: Sequence[int]
    limits: Sequence[int]
    won: torch.Tensor  # (n,)
    best: torch.Tensor  # (n, at most 20); as are their ``token_ids``
    token_ids: torch.Tensor


class Draw(NamedTuple):
    """The tokens of a batch, (num_rows,) int64, and the logprobs that were asked for; all still on the device.

    NOT_FINITE where the logits are not.
    """

    tokens: torch.Tensor
    logprobs: Sequence[_Logprobs] = ()

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
        return sampled


class Sampler:
    """Samples one token for each row of logits.

    ``eos_token_ids`` are the ids that ``min_tokens`` bars besides a request's own stop ids.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Collection[int], device: torch.device) -> None:
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._slots: dict[int, _Slot] = {}
        self._seen = SeenTokens(device)
        self._hashed_ids = hash_token_ids(torch.arange(vocab_size, device=device))  # (vocab_size,)

    def start(self, start: SlotStart) -> None:
        """A request takes a slot, anew or again after a preemption; whatever the slot held is forgotten."""
        self._slots[start.slot] = _Slot(start, self._eos_token_ids)
        if start.params.penalizes:
            self._seen.start(start.slot, start.prompt_ids, start.generated_ids)

    def draw(self, logits: torch.Tensor, places: Sequence[tuple[int, int]]) -> Draw:
        """Draw a token for each row; does not wait for the device.

        ``logits``: (num_rows, vocab_size) float32 on the device, which this may change. ``places``: of each row the
        slot, and the index of the new token in its prompt + output. Only a slot whose tokens do not depend on those
        before them (no penalties, min_tokens reached) may appear several times.
        """
        states, positions = [self._slots[slot] for slot, _ in places], [position for _, position in places]
        is_finite = logits.amax(dim=-1) < torch.inf  # or -inf: what is barred is not counted
        self._process(logits, states)
        choices = self._choose(logits, states, positions)
        tokens = torch.zeros(len(states), dtype=torch.int64, device=self._device)
        for choice in choices:
            tokens[self._index(choice.rows)] = choice.tokens
        self._advance(states, tokens)
        tokens = torch.where(is_finite, tokens, NOT_FINITE)
        return Draw(tokens, [found for choice in choices if (found := self._logprobs(choice, states))])

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

    def _choose(self, logits: torch.Tensor, states: Sequence[_Slot], positions: Sequence[int]) -> list[_Choice]:
        params = [state.params for state in states]
        greedy = [row for row, p in enumerate(params) if p.greedy]
        free = [row for row, p in enumerate(params) if not p.greedy and not is_filtered(p)]
        filtered = [row for row, p in enumerate(params) if not p.greedy and is_filtered(p)]
        keys = [noise_key(p.seed or 0, position) for p, position in zip(params, positions, strict=True)]
        choices = []
        if greedy:
            scores = self._take(logits, greedy)
            choices.append(_Choice(greedy, scores, None, _argmax(scores)))
        if free:
            scores = _temper(self._take(logits, free), [params[row] for row in free])
            columns = _race(scores, [keys[row] for row in free], self._hashed_ids)
            choices.append(_Choice(free, scores, None, columns))
        if filtered:
            picked = [params[row] for row in filtered]
            for places, scores, token_ids in survivors(_temper(self._take(logits, filtered), picked), picked):
                rows = [filtered[place] for place in places]
                columns = _race(scores, [keys[row] for row in rows], self._hashed_ids[token_ids])
                choices.append(_Choice(rows, scores, token_ids, columns))
        return choices

    def _advance(self, states: Sequence[_Slot], tokens: torch.Tensor) -> None:
        """Count the tokens for what depends on them: min_tokens and the penalties."""
        for state in states:
            state.num_barred -= state.num_barred > 0
        penalized = [row for row, state in enumerate(states) if state.params.penalizes]
        if penalized:
            self._seen.add([states[row].slot for row in penalized], self._take(tokens, penalized))

    def _logprobs(self, choice: _Choice, states: Sequence[_Slot]) -> _Logprobs | None:
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

    def _take(self, of_rows: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return of_rows if len(rows) == len(of_rows) else of_rows[self._index(rows)]

    def _index(self, ids: Sequence[int]) -> torch.Tensor:
        return to_device(ids, self._device, torch.int64)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """The column of each row's maximum, the lowest among equals. (num_rows,) int64"""
    if scores.device.type == "cpu" and len(scores):
        # Measured on rows of 49,152: 3 µs a row in numpy, 41 µs in torch, whose CPU kernel is not vectorized.
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def _temper(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Scores over temperature, shifted so that each row's maximum is 0 and nothing overflows."""
    temperatures = [[max(p.temperature, _LOWEST_TEMPERATURE)] for p in params]
    temperature = to_device(temperatures, scores.device, torch.float32)
    top = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    return (scores - top).div_(temperature)


def _race(scores: torch.Tensor, keys: Sequence[tuple[int, int]], hashed_ids: torch.Tensor) -> torch.Tensor:
    """Draw a column of each row with probability softmax(scores). ``hashed_ids``: those of the columns."""
    weights = scores.softmax(dim=-1)
    if hashed_ids.dim() > 1 or scores.device.type != "cpu":
        return _argmax(weights.div_(exponential_noise(keys, hashed_ids)))
    # Over the whole vocabulary the noise of one row fits a CPU's cache, that of a batch does not.
    for row, key in zip(weights, keys, strict=True):
        row.div_(exponential_noise([key], hashed_ids)[0])
    return _argmax(weights)
