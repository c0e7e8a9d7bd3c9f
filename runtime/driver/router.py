"""Picks the replica that a request goes to: the one with the least work, where what it has computed already is none.

What replicas have computed is guessed from what they were sent; one that has given it up computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardray.runtime.driver.caller import caller_name
from shardray.runtime.driver.fleet import ReplicaStatus
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.engine.request import ServedModel

# What a request in flight delays others by, in tokens of a prompt: so many more have to be there already before a
# replica is worth it that runs one request more.
_REQUEST_TOKENS = 256


class Router:
    """Knows what the replicas were sent. Use it in one asyncio loop.

    ``shares_between_callers``: whether what one caller's requests have computed is there for those of others.
    """

    def __init__(self, shares_between_callers: bool = False) -> None:
        self._shares_between_callers = shares_between_callers
        self._held: dict[int, _HeldBlocks] = {}  # by replica id, of those that share what they computed

    def attach(self, replica_id: int, model: ServedModel) -> None:
        """A replica has computed nothing yet."""
        self.detach(replica_id)
        if model.prefix_block_size:
            self._held[replica_id] = _HeldBlocks(model.prefix_block_size, model.num_kv_tokens)

    def detach(self, replica_id: int) -> None:
        """A replica is gone. Idempotent."""
        self._held.pop(replica_id, None)

    def pick(self, entry: JournalEntry, candidates: Sequence[ReplicaStatus]) -> ReplicaStatus:
        """The candidate with the least work; equals are told apart by how full their pages are, then by id.

        Work is requests in flight with their beams, which the driver counts itself, and what is to be computed of this
        one. The pages are as of the last snapshot.
        """
        if len(candidates) == 1:
            return candidates[0]

        def rank(replica: ReplicaStatus) -> tuple[float, float, int]:
            work = replica.num_live_sequences * _REQUEST_TOKENS - self._num_held(entry, replica.replica_id)
            return work, _page_use(replica), replica.replica_id

        return min(candidates, key=rank)

    def prefix_scope(self, entry: JournalEntry) -> str:
        """See EngineRequest."""
        return "" if self._shares_between_callers else caller_name(entry.request_id)

    def add(self, entry: JournalEntry, replica_id: int) -> None:
        """A replica computes a request, or has done so: its tokens so far are there."""
        if len(self._held) > 1 and (held := self._held.get(replica_id)) is not None:
            held.add(self.prefix_scope(entry), entry)

    def _num_held(self, entry: JournalEntry, replica_id: int) -> int:
        held = self._held.get(replica_id)
        return 0 if held is None else held.count(self.prefix_scope(entry), entry)


class _HeldBlocks:
    """Blocks of tokens that a replica has, each as a hash of it and of all before it, the one used last at the end."""

    def __init__(self, block_size: int, num_tokens: int) -> None:
        self._block_size = block_size
        self._most = num_tokens // block_size
        self._hashes: dict[int, None] = {}

    def add(self, scope: str, entry: JournalEntry) -> None:
        for block in reversed([*self._blocks(scope, entry)]):  # so that the first block outlives those behind it
            self._hashes.pop(block, None)
            self._hashes[block] = None
        while len(self._hashes) > self._most:
            del self._hashes[next(iter(self._hashes))]

    def count(self, scope: str, entry: JournalEntry) -> int:
        """Tokens of a request that are there."""
        num_blocks = 0
        for block in self._blocks(scope, entry):
            if block not in self._hashes:
                break
            num_blocks += 1
        return num_blocks * self._block_size

    def _blocks(self, scope: str, entry: JournalEntry) -> Iterator[int]:
        block, size, token_ids = hash(scope), self._block_size, (*entry.prompt_ids, *entry.sent_ids)
        for end in range(size, len(token_ids) + 1, size):
            block = hash((block, token_ids[end - size : end]))
            yield block


def _page_use(replica: ReplicaStatus) -> float:
    return replica.stats.num_used_pages / replica.stats.num_pages if replica.stats.num_pages else 0.0
