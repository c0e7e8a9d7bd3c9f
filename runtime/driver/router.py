"""Picks the replica that a request goes to."""

from __future__ import annotations

from collections.abc import Sequence

from shardray.runtime.driver.fleet import ReplicaStatus
from shardray.runtime.driver.journal_entry import JournalEntry


def pick_replica(entry: JournalEntry, candidates: Sequence[ReplicaStatus]) -> ReplicaStatus:
    """The least loaded candidate; equals are told apart by how full their pages are, then by id.

    Load is requests in flight, which the driver counts itself; the pages are as of the last snapshot. ``entry`` has the
    prompt: the prefix that a replica already holds belongs between load and pages, once replicas keep prefixes.
    """
    return min(candidates, key=lambda replica: (replica.num_live_requests, _page_use(replica), replica.replica_id))


def _page_use(replica: ReplicaStatus) -> float:
    return replica.stats.num_used_pages / replica.stats.num_pages if replica.stats.num_pages else 0.0
