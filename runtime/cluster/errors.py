"""What can go wrong with a fleet. Every message is one line that says what happened, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardray.runtime.cluster.remote_host import RemoteHost


class ClusterError(RuntimeError):
    """The fleet cannot do what was asked."""


class PlacementError(ClusterError):
    """The cluster has no room for a replica's hosts."""


class HostDied(ClusterError):
    """A host's process or its node is gone."""


class HostSilent(ClusterError):
    """A host did not answer in time, or cannot be reached: whether it lives is not known."""


class FormError(ClusterError):
    """A mesh could not be formed; ``survivors`` are unassigned again, its other hosts dead."""

    def __init__(self, message: str, survivors: Sequence[RemoteHost] = ()) -> None:
        super().__init__(message)
        self.survivors = tuple(survivors)
