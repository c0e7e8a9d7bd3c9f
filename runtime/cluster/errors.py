"""What can go wrong with a fleet. Every message is one line that says what happened, where, and what to do."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """The fleet cannot do what was asked."""


class PlacementError(ClusterError):
    """The cluster has no room for a replica's hosts."""


class HostDied(ClusterError):
    """A host's process or its node is gone."""


class HostSilent(ClusterError):
    """A host did not answer in time."""


class FormError(ClusterError):
    """A mesh could not be formed; its hosts are unassigned again, or dead."""
