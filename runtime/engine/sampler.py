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

from shardray.runtime.engine.candidates import is_filtered, survivors
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

    @property
    def plain(self) -> bool:
        """Whether the highest logit is all that matters."""
        params = self.params
        processed = params.penalizes or bool(params.logit_bias) or self.num_barred > 0
        return params.greedy and params.logprobs is None and not processed


class _Choice(NamedTuple):
    """The winners of some rows of a batch."""

    rows: torch.Tensor  # (n,) indices into the batch
    scores: torch.Tensor  # (n, width) processed scores, -inf where filtered
    token_ids: torch.Tensor | None  # (n, width), None if the columns are the vocabulary
    columns: torch.Tensor  # (n,) the column that won

    @property
    def tokens(self) -> torch.Tensor:
        return self.columns if self.token_ids is None else self.token_ids.gather(1, self.columns[:, None]).view(-1)


class Sampler:
    """Samples one token for each row of logits.

    ``eos_token_ids`` are the ids that ``min_tokens`` bars besides a request's own stop ids; ``suppressed_ids`` are
    never chosen.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: Collection[int], device: torch.device, suppressed_ids: Sequence[int] = ()
    ) -> None:
        self._suppressed_ids = torch.tensor(suppressed_ids, dtype=torch.int64, device=device)
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._slots: dict[int, _Slot] = {}
        self._plain: dict[int, bool] = {}
        self._seen = SeenTokens(device)
        self._hashed_ids = hash_token_ids(torch.arange(vocab_size, device=device))  # (vocab_size,)

    def start(self, start: SlotStart) -> None:
        """A request takes a slot, anew or again after a preemption; whatever the slot held is forgotten."""
        slot = self._slots[start.slot] = _Slot(start, self._eos_token_ids)
        self._plain[start.slot] = slot.plain
        if start.params.penalizes:
            self._seen.start(start.slot, start.prompt_ids, start.generated_ids)

    def sample(
        self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]
    ) -> tuple[torch.Tensor, list[Sampled]]:
        """Token ids (num_rows,) int64 on the device, and the same with the logprobs that were asked for.

        ``logits``: (num_rows, vocab_size) float32 on the device, which this may change. ``positions[i]``: index of the
        new token of row i in its prompt + output. No slot may appear twice.
        """
        if self._suppressed_ids.numel():
            logits[:, self._suppressed_ids] = -torch.inf
        if all(map(self._plain.__getitem__, slots)):
            tokens = _argmax(logits)
            return tokens, [Sampled(token_id) for token_id in tokens.tolist()]
        states = [self._slots[slot] for slot in slots]
        self._process(logits, states)
        choices = self._choose(logits, states, positions)
        tokens = torch.empty(len(states), dtype=torch.int64, device=self._device)
        for choice in choices:
            tokens[choice.rows] = choice.tokens
        sampled = _report(choices, states, tokens)
        self._advance(states, sampled)
        return tokens, sampled

    def _process(self, logits: torch.Tensor, states: Sequence[_Slot]) -> None:
        """Logit bias, penalties and min_tokens, in place."""
        biased = [(row, *item) for row, state in enumerate(states) for item in state.params.logit_bias.items()]
        if biased:
            rows, token_ids, biases = zip(*biased, strict=True)
            logits[self._index(rows), self._index(token_ids)] += torch.tensor(biases, device=self._device)
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
        keys = {row: noise_key(params[row].seed or 0, positions[row]) for row in (*free, *filtered)}
        choices = []
        if greedy:
            scores = self._take(logits, greedy)
            choices.append(_Choice(self._index(greedy), scores, None, _argmax(scores)))
        if free:
            scores = _temper(self._take(logits, free), [params[row] for row in free])
            columns = _race(scores, [keys[row] for row in free], self._hashed_ids)
            choices.append(_Choice(self._index(free), scores, None, columns))
        if filtered:
            index, picked = self._index(filtered), [params[row] for row in filtered]
            for rows, scores, token_ids in survivors(_temper(self._take(logits, filtered), picked), picked):
                rows = index[rows]
                columns = _race(scores, [keys[row] for row in rows.tolist()], self._hashed_ids[token_ids])
                choices.append(_Choice(rows, scores, token_ids, columns))
        return choices

    def _advance(self, states: Sequence[_Slot], sampled: Sequence[Sampled]) -> None:
        """Count the tokens for what depends on them: min_tokens and the penalties."""
        for state in states:
            if state.num_barred > 0:
                state.num_barred -= 1
                self._plain[state.slot] = state.plain
        penalized = [row for row, state in enumerate(states) if state.params.penalizes]
        if penalized:
            self._seen.add([states[row].slot for row in penalized], [sampled[row].token_id for row in penalized])

    def _take(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return logits if len(rows) == len(logits) else logits[self._index(rows)]

    def _index(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """The column of each row's maximum, the lowest among equals. (num_rows,) int64"""
    if scores.device.type == "cpu" and len(scores):
        # Measured on rows of 49,152: 3 µs a row in numpy, 41 µs in torch, whose CPU kernel is not vectorized.
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def _temper(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Scores over temperature, shifted so that each row's maximum is 0 and nothing overflows."""
    temperature = torch.tensor([[max(p.temperature, _LOWEST_TEMPERATURE)] for p in params], device=scores.device)
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


def _report(choices: Sequence[_Choice], states: Sequence[_Slot], tokens: torch.Tensor) -> list[Sampled]:
    sampled = [Sampled(token_id) for token_id in tokens.tolist()]
    for choice in choices:
        rows = choice.rows.tolist()
        wanted = [i for i, row in enumerate(rows) if states[row].params.logprobs is not None]
        if wanted:
            limits = [states[rows[i]].params.logprobs or 0 for i in wanted]
            for i, (logprob, top) in zip(wanted, _logprobs(choice, wanted, limits), strict=True):
                sampled[rows[i]] = Sampled(sampled[rows[i]].token_id, logprob, top)
    return sampled


def _logprobs(
    choice: _Choice, wanted: Sequence[int], limits: Sequence[int]
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """The winner's logprob and the top ``limits[i]`` (token id, logprob) of the ``wanted`` rows; finite ones only."""
    index = torch.tensor(wanted, device=choice.scores.device)
    logprobs = choice.scores[index].log_softmax(dim=-1)  # (num_wanted, width)
    won = logprobs.gather(1, choice.columns[index, None]).view(-1).tolist()
    if not any(limits):
        return [(logprob, ()) for logprob in won]
    best, columns = logprobs.topk(min(_MAX_TOP_LOGPROBS, logprobs.shape[1]), dim=-1)
    token_ids = columns if choice.token_ids is None else choice.token_ids[index].gather(1, columns)
    ranked = [
        sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        for ids, values in zip(token_ids.tolist(), best.tolist(), strict=True)
    ]
    finite = [[pair for pair in pairs if math.isfinite(pair[1])] for pairs in ranked]
    return [(logprob, tuple(pairs[:n])) for logprob, pairs, n in zip(won, finite, limits, strict=True)]
