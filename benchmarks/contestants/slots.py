"""Which sequence of llama.cpp has which id, and the order in which a batch holds them. Standard library only.

Sequences that each have a KV buffer of their own are computed together only as far as their ids are consecutive and
ascend in the batch (``llama_batch_allocr::split_equal`` with ``sequential``); every step of another kind starts a
forward pass of its own. So the lowest free id goes out first, and a batch has its ids in order.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from benchmarks.protocol import Request


@dataclass
class Sequence:
    """A request, and the tokens that llama.cpp has yet to see of it: prompt tokens, then the one sampled last."""

    index: int  # of the request, in the list that is served
    pending: deque[int]
    num_left: int  # tokens that are still wanted
    temperature: float = 0.0
    top_p: float = 1.0
    num_done: int = 0  # tokens that llama.cpp has seen

    @classmethod
    def of(cls, index: int, request: Request) -> Sequence:
        return cls(index, deque(request.prompt_ids), request.max_tokens, request.temperature, request.top_p)


@dataclass
class Slots:
    """At most ``num_slots`` sequences run; the others wait in the order in which they came."""

    num_slots: int
    running: dict[int, Sequence] = field(default_factory=dict)  # by sequence id
    _waiting: deque[Sequence] = field(default_factory=deque)
    _free_ids: list[int] = field(init=False)  # a heap

    def __post_init__(self) -> None:
        self._free_ids = list(range(self.num_slots))

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def admit(self) -> None:
        while self._waiting and self._free_ids:
            self.running[heapq.heappop(self._free_ids)] = self._waiting.popleft()

    def plan(self, most_tokens: int) -> list[tuple[int, Sequence, int]]:
        """(id, sequence, tokens to read of it): sequences that decode, then prompts as far as ``most_tokens`` go."""
        rows = []
        for seq_id, one in sorted(self.running.items(), key=lambda item: (len(item[1].pending) > 1, item[0])):
            if num_tokens := min(len(one.pending), most_tokens):
                rows.append((seq_id, one, num_tokens))
            most_tokens -= num_tokens
        return rows

    def release_ended(self) -> list[int]:
        """The ids of sequences that have all their tokens; they are free again."""
        ended = [seq_id for seq_id, one in self.running.items() if not one.num_left]
        for seq_id in ended:
            del self.running[seq_id]
            heapq.heappush(self._free_ids, seq_id)
        return ended
