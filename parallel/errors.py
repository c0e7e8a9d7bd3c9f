"""What can go wrong between ranks. Every error says which operation and, where it is known, which rank."""

from __future__ import annotations

from collections.abc import Sequence

from shardray.parallel.place import Member


class MeshError(RuntimeError):
    """A mesh can no longer run; it has to be formed again."""

    step: int | None = None  # of the engine, where one was running
    operation: str | None = None  # the collective or hand-off at hand


class CollectiveTimeout(MeshError):
    """A rank did not arrive at a collective within its deadline.

    ``missing`` holds the ranks of the mesh known not to have arrived; empty when the backend cannot tell.
    """

    def __init__(self, operation: str, waited_s: float, missing: Sequence[Member] = ()) -> None:
        super().__init__(f"{operation}: {_names(missing)} did not arrive within {waited_s:g} s")
        self.operation = operation
        self.waited_s = waited_s
        self.missing = tuple(member.rank for member in missing)


class PeerLost(MeshError):
    """A rank's process ended, or its connection broke. ``missing``: the ranks of the mesh, where they are known."""

    def __init__(self, operation: str, cause: str, missing: Sequence[Member] = ()) -> None:
        super().__init__(f"{operation}: lost {_names(missing)}: {cause}")
        self.operation = operation
        self.missing = tuple(member.rank for member in missing)


class DeviceTimeout(MeshError):
    """A device did not finish what it was given within the deadline: it hangs, or waits for one that does."""

    def __init__(self, operation: str, device: str, waited_s: float) -> None:
        super().__init__(f"{operation}: {device} did not finish within {waited_s:g} s")
        self.operation = operation


class DeviceLost(MeshError):
    """A device failed at what it was given."""

    def __init__(self, operation: str, device: str, cause: str) -> None:
        super().__init__(f"{operation}: {device} failed: {cause}")
        self.operation = operation


class MeshAborted(MeshError):
    """This rank was told to leave its mesh."""


def _names(members: Sequence[Member]) -> str:
    return " and ".join(map(str, members)) or "a rank"
