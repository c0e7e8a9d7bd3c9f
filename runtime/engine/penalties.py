"""Which tokens each slot has seen: the state behind the repetition, presence and frequency penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from shardray.runtime.engine.inputs import to_device
from shardray.runtime.engine.request import SamplingParams

_SMALLEST_FACTOR = 1e-30  # below it a repetition penalty would round to 0 in float32, and 0 / 0 is not a score


class SeenTokens:
    """Per slot, the distinct tokens of prompt and output, and how often each was output.

    Kept as lists, not over the whole vocabulary, so that a step reads and writes no more scores than it changes. The
    tables are (num_slots, width) and grow with the slots that penalize and with what they have seen. How many distinct
    tokens a slot has is known on the device alone, which sampled them; the host knows how many there can be at most.
    """

    def __init__(self, device: torch.device) -> None:
        self._most: dict[int, int] = {}  # slot -> tokens that it may have
        self._lens = torch.zeros(0, dtype=torch.int64, device=device)
        self._token_ids = torch.zeros(0, 256, dtype=torch.int64, device=device)
        self._counts = torch.zeros(0, 256, dtype=torch.float32, device=device)  # output only

    def start(self, slot: int, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """Forget the slot's tokens and take these instead."""
        counts, distinct = Counter(generated_ids), list(dict.fromkeys((*prompt_ids, *generated_ids)))
        self._most[slot] = num_tokens = len(distinct)
        self._fit(slot + 1, num_tokens)
        self._lens[slot] = num_tokens
        self._token_ids[slot, :num_tokens] = self._index(distinct)
        self._counts[slot] = 0.0
        self._counts[slot, :num_tokens] = self._index([counts[token_id] for token_id in distinct]).float()

    def add(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """Count one sampled token of each of these different slots. ``token_ids``: (n,) on the device"""
        for slot in slots:
            self._most[slot] += 1
        width = max(self._most[slot] for slot in slots)
        self._fit(0, width)
        index = self._index(slots)
        lens = self._lens[index]
        known = self._token_ids[index, :width] == token_ids[:, None]
        known &= torch.arange(width, device=known.device) < lens[:, None]
        is_known, column = known.max(dim=1)
        column = torch.where(is_known, column, lens)
        self._token_ids[index, column] = token_ids
        self._counts[index, column] += 1.0
        self._lens[index] = lens + ~is_known

    def penalize(
        self, logits: torch.Tensor, rows: Sequence[int], slots: Sequence[int], params: Sequence[SamplingParams]
    ) -> None:
        """Apply the penalties of ``slots`` to these different ``rows`` of ``logits``, in place.

        Repetition divides positive scores and multiplies negative ones (Keskar et al., CTRL, 2019). Then, as the OpenAI
        API defines them, presence is subtracted once and frequency per occurrence, both over the output alone.
        """
        index = self._index(slots)
        lens = self._lens[index][:, None]
        # A shorter row repeats its last token, which then gets the same score several times.
        longest = max(self._most[slot] for slot in slots)
        columns = torch.arange(longest, device=logits.device).minimum(lens - 1)  # (num_rows, longest)
        seen = index[:, None], columns
        place = self._index(rows)[:, None], self._token_ids[seen]
        table = [(max(p.repetition_penalty, _SMALLEST_FACTOR), p.presence_penalty, p.frequency_penalty) for p in params]
        repetition, presence, frequency = to_device(table, logits.device, torch.float32).T[:, :, None]  # (num_rows, 1)
        scores, counts = logits[place], self._counts[seen]  # (num_rows, longest)
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        logits[place] = scores.sub(counts * frequency).sub((counts > 0) * presence)

    def _fit(self, num_slots: int, width: int) -> None:
        """Grow the tables to at least this size; the width at least doubles, so that it seldom has to."""
        old_slots, old_width = self._counts.shape
        new_width = old_width if width <= old_width else max(width, 2 * old_width)
        growth = (0, new_width - old_width, 0, max(0, num_slots - old_slots))
        if any(growth):
            self._token_ids, self._counts = pad(self._token_ids, growth), pad(self._counts, growth)
            self._lens = pad(self._lens, growth[2:])

    def _index(self, ids: Sequence[int]) -> torch.Tensor:
        return to_device(ids, self._counts.device, torch.int64)
