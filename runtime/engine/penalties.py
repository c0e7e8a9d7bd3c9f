"""Which tokens each slot has seen: the state behind the repetition, presence and frequency penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardray.runtime.engine.request import SamplingParams

_SMALLEST_FACTOR = 1e-30  # below it a repetition penalty would round to 0 in float32, and 0 / 0 is not a score


class SeenTokens:
    """Per slot, the tokens of prompt and output and how often each was output.

    Dense over the vocabulary, so that a step is a few operations for all rows at once; the tables take
    num_slots * vocab_size * 5 bytes and grow with the highest slot that penalizes.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)  # output only

    def start(self, slot: int, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """Forget the slot's tokens and take these instead."""
        self._grow(slot + 1)
        prompt, generated = self._ids(prompt_ids), self._ids(generated_ids)
        self._seen[slot] = False
        self._seen[slot, prompt] = True
        self._seen[slot, generated] = True
        self._counts[slot] = torch.bincount(generated, minlength=self._counts.shape[1])

    def add(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """Count one sampled token of each of these different slots. ``token_ids``: (num_slots,) int64."""
        index = self._ids(slots)
        self._seen[index, token_ids] = True
        self._counts[index, token_ids] += 1.0

    def penalize(self, scores: torch.Tensor, slots: Sequence[int], params: Sequence[SamplingParams]) -> torch.Tensor:
        """``scores`` (num_rows, vocab_size) after the penalties of each row's slot.

        Repetition divides positive scores and multiplies negative ones (Keskar et al., CTRL, 2019). Then, as the OpenAI
        API defines them, presence is subtracted once and frequency per occurrence, both over the output alone.
        """
        index = self._ids(slots)
        table = [(max(p.repetition_penalty, _SMALLEST_FACTOR), p.presence_penalty, p.frequency_penalty) for p in params]
        repetition, presence, frequency = torch.tensor(table, device=scores.device).T[:, :, None]  # (num_rows, 1)
        seen, counts = self._seen[index], self._counts[index]  # (num_rows, vocab_size)
        repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores = torch.where(seen, repeated, scores)
        return scores.sub(counts * frequency).sub((counts > 0) * presence)

    def _grow(self, num_slots: int) -> None:
        missing = num_slots - self._seen.shape[0]
        if missing > 0:
            self._seen = torch.nn.functional.pad(self._seen, (0, 0, 0, missing))
            self._counts = torch.nn.functional.pad(self._counts, (0, 0, 0, missing))

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._seen.device)
