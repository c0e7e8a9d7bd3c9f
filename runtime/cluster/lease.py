"""How long a host outlives its driver: a lease that the driver renews.

When it runs out, the host ends. If no other host of the fleet has been renewed since, the driver is gone, and the room
of the whole fleet is given back: no device stays held by a fleet that nobody owns. Otherwise it is this host that the
driver could not reach, and the fleet goes on without it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Collection
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import list_named_actors
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

HOST_NAME = "shardray-host-"  # what the names of hosts, as actors, begin with
_log = logging.getLogger(__name__)
_CHECK_S = 1.0
_ANSWER_S = 10.0
_FIRST_LEASE_S = 120.0  # until the first renewal
SILENCE_S = 5.0  # a driver that has not renewed for so long may be replaced
RENEWAL_S = 1.5
_SAME_DRIVER_S = 2 * RENEWAL_S  # leases that a driver renewed for the last time differ by less


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

    @property
    def renewed_s_ago(self) -> float:
        with self._lock:
            return time.monotonic() - self._renewed_s

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
            latest_s = min(_others_renewed_s_ago(), default=math.inf)
            if latest_s > self.renewed_s_ago - _SAME_DRIVER_S:
                give_back_groups(ray.get_runtime_context().namespace)
        finally:
            os._exit(1)


def host_names() -> set[str]:
    """What the fleet's hosts are called, as actors of this Ray namespace. Blocks."""
    return {name for name in list_named_actors() if name.startswith(HOST_NAME)}


def _others_renewed_s_ago() -> list[float]:
    """Seconds since each other host of this fleet was renewed; 0 for one that lives and does not answer. Blocks."""
    own = ray.get_runtime_context().get_actor_name()
    calls: list[Any] = []
    for name in host_names() - {own}:
        with contextlib.suppress(ValueError):  # it has ended since
            calls.append(ray.get_actor(name).renewed_s_ago.remote())
    found = []
    for call in calls:
        with contextlib.suppress(RayActorError):
            try:
                found.append(float(ray.get(call, timeout=_ANSWER_S)))
            except GetTimeoutError:
                found.append(0.0)
    return found


def group_prefix(namespace: str) -> str:
    """What the names of a fleet's placement groups begin with."""
    return f"shardray/{namespace}/"


def give_back_groups(namespace: str, but: Collection[str] = ()) -> None:
    """Remove the placement groups of a fleet, except those named in ``but``; whoever sits in them is ended. Blocks."""
    for entry in placement_group_table().values():
        name, state = entry["name"], entry["state"]
        if name.startswith(group_prefix(namespace)) and name not in but and state != "REMOVED":
            remove_placement_group(get_placement_group(name))
