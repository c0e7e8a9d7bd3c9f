"""Which tokens each slot has seen: the state behind the repetition, presence and frequency penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from shardray.runtime.engine.request import SamplingParams

_SMALLEST_FACTOR = 1e-30  # below it a repetition penalty would round to 0 in float32, and 0 / 0 is not a score


class SeenTokens:
    """Per slot, the distinct tokens of prompt and output, and how often each was output.

    Kept as lists, not over the whole vocabulary, so that a step reads and writes no more scores than it changes. The
    tables are (num_slots, width) and grow with the slots that penalize and with what they have seen.
    """

    def __init__(self, device: torch.device) -> None:
        self._columns: dict[int, dict[int, int]] = {}  # slot -> token id -> its column in the tables
        self._token_ids = torch.zeros(0, 256, dtype=torch.int64, device=device)
        self._counts = torch.zeros(0, 256, dtype=torch.float32, device=device)  # output only

    def start(self, slot: int, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """Forget the slot's tokens and take these instead."""
        counts = Counter(generated_ids)
        columns = {token_id: column for column, token_id in enumerate(dict.fromkeys((*prompt_ids, *generated_ids)))}
        self._columns[slot] = columns
        self._fit(slot + 1, len(columns))
        self._token_ids[slot, : len(columns)] = self._index(list(columns))
        self._counts[slot] = 0.0
        self._counts[slot, : len(columns)] = self._index([counts[token_id] for token_id in columns]).float()

    def add(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Count one sampled token of each of these different slots."""
        columns = [
            self._columns[slot].setdefault(token_id, len(self._columns[slot]))
            for slot, token_id in zip(slots, token_ids, strict=True)
        ]
        self._fit(0, max(columns) + 1)
        place = self._index(slots), self._index(columns)
        self._token_ids[place] = self._index(token_ids)
        self._counts[place] += 1.0

    def penalize(
        self, logits: torch.Tensor, rows: Sequence[int], slots: Sequence[int], params: Sequence[SamplingParams]
    ) -> None:
        """Apply the penalties of ``slots`` to these different ``rows`` of ``logits``, in place.

        Repetition divides positive scores and multiplies negative ones (Keskar et al., CTRL, 2019). Then, as the OpenAI
        API defines them, presence is subtracted once and frequency per occurrence, both over the output alone.
        """
        lens = self._index([len(self._columns[slot]) for slot in slots])[:, None]
        # A shorter row repeats its last token, which then gets the same score several times.
        columns = torch.arange(int(lens.max()), device=logits.device).minimum(lens - 1)  # (num_rows, longest)
        seen = self._index(slots)[:, None], columns
        place = self._index(rows)[:, None], self._token_ids[seen]
        table = [(max(p.repetition_penalty, _SMALLEST_FACTOR), p.presence_penalty, p.frequency_penalty) for p in params]
        repetition, presence, frequency = torch.tensor(table, device=logits.device).T[:, :, None]  # (num_rows, 1)
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

    def _index(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._counts.device)
