"""Which request runs on which replica, and the links over which the replicas are told.

A request is dispatched under an id of its own: the client's may come again while a replica still has the end of its
last use to tell, and a replica may not have ended yet what an earlier driver dispatched.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets

from shardray.runtime.driver.fleet import Fleet, ReplicaStatus
from shardray.runtime.driver.link import ReplicaLink
from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.router import Router


class Dispatches:
    """Requests that are with a replica. Use it in one asyncio loop."""

    def __init__(self, fleet: Fleet, router: Router, max_num_seqs: int) -> None:
        self.links: dict[int, ReplicaLink] = {}  # by replica id, of those that are up
        self.by_id: dict[str, LiveRequest] = {}  # by dispatch id
        self._fleet = fleet
        self._router = router
        # A replica gets a few more than it can run, so that a freed place is taken in its next step.
        self._capacity = max_num_seqs + max(1, max_num_seqs // 8)
        self._driver_id = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._closing: set[asyncio.Task[None]] = set()  # keeps them from being collected

    def with_room(self) -> list[ReplicaStatus]:
        """Replicas that are ready and have a place."""
        return [replica for replica in self._fleet.ready_replicas() if replica.num_live_sequences < self._capacity]

    def send(self, live: LiveRequest, replica_id: int) -> None:
        """Hand a request that waits to a replica."""
        live.dispatch_id = f"{live.request_id}#{self._driver_id}.{next(self._numbers)}"
        live.replica_id = replica_id
        live.num_dispatched_with = len(live.entry.sent_ids)
        self.by_id[live.dispatch_id] = live
        self._fleet.add_live(replica_id, +1, live.entry.params.num_beams)
        self._router.add(live.entry, replica_id)
        live.stream.mark_dispatched()
        self.links[replica_id].submit(
            live.entry.as_engine_request(live.dispatch_id, live.is_traced, self._router.prefix_scope(live.entry))
        )

    def cancel(self, live: LiveRequest) -> None:
        """Tell its replica, if it has one that is up, to stop it."""
        if live.replica_id is not None and (link := self.links.get(live.replica_id)) is not None:
            link.cancel(live.dispatch_id)

    def withdraw(self, live: LiveRequest) -> None:
        """Forget that a request was dispatched."""
        if live.replica_id is not None:
            del self.by_id[live.dispatch_id]
            self._fleet.add_live(live.replica_id, -1, live.entry.params.num_beams)
            self._router.add(live.entry, live.replica_id)
            live.replica_id = None

    def withdraw_all(self, replica_id: int, link: ReplicaLink | None) -> list[LiveRequest]:
        """Forget what a replica runs; ``link`` tells it to stop. Returns the requests."""
        taken = [live for live in self.by_id.values() if live.replica_id == replica_id]
        for live in taken:
            if link is not None:
                link.cancel(live.dispatch_id)
            self.withdraw(live)
        return taken

    def close_soon(self, link: ReplicaLink) -> None:
        """Close a link that is in use no longer."""
        closing = asyncio.create_task(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close every link."""
        links, self.links = self.links, {}
        await asyncio.gather(*(link.close() for link in links.values()), *self._closing)
