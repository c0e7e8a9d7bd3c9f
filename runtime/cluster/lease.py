"""How long a host outlives its driver: a lease that the driver renews.

When it runs out, the host ends, and the room of the whole fleet is given back: no device stays held by a fleet that
nobody owns.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection

import ray
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

_log = logging.getLogger(__name__)
_CHECK_S = 1.0
_FIRST_LEASE_S = 120.0  # until the first renewal
SILENCE_S = 5.0  # a driver that has not renewed for so long may be replaced
RENEWAL_S = 1.5


class Lease:
    """Thread-safe. Watched by a thread of its own, which ends the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: str | None = None
        self._renewed_s = time.monotonic()
        self._end_s = self._renewed_s + _FIRST_LEASE_S
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def renew(self, owner: str, lease_s: float) -> bool:
        """Whether the lease is ``owner``'s now: it was, or whose it was has been silent."""
        now = time.monotonic()
        with self._lock:
            if self._owner not in (None, owner) and now - self._renewed_s < SILENCE_S:
                return False
            self._owner, self._renewed_s, self._end_s = owner, now, now + lease_s
            return True

    def _extend(self, lost_s: float) -> None:
        with self._lock:
            self._end_s += lost_s

    def _watch(self) -> None:
        while (now := time.monotonic()) < self._end_s:
            time.sleep(_CHECK_S)
            # While an import held the interpreter's lock, or the process stood still, no renewal could be heard.
            self._extend(time.monotonic() - now - _CHECK_S)
        _log.error("no driver has renewed this host's lease: it ends")
        try:
            give_back_groups(ray.get_runtime_context().namespace)
        finally:
            os._exit(1)


def group_prefix(namespace: str) -> str:
    """What the names of a fleet's placement groups begin with."""
    return f"shardray/{namespace}/"


def give_back_groups(namespace: str, but: Collection[str] = ()) -> None:
    """Remove the placement groups of a fleet, except those named in ``but``; whoever sits in them is ended. Blocks."""
    for entry in placement_group_table().values():
        name, state = entry["name"], entry["state"]
        if name.startswith(group_prefix(namespace)) and name not in but and state != "REMOVED":
            remove_placement_group(get_placement_group(name))
