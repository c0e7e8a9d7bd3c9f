"""What can go wrong between ranks. Every error says which operation and, where it is known, which rank."""

from __future__ import annotations


class MeshError(RuntimeError):
    """A mesh can no longer run; it has to be formed again."""

    step: int | None = None  # of the engine, where one was running
    operation: str | None = None  # the collective or hand-off at hand


class CollectiveTimeout(MeshError):
    """A rank did not arrive at a collective within its deadline.

    ``missing`` holds the ranks (of the group) known not to have arrived; empty when the backend cannot tell.
    """

    def __init__(self, operation: str, waited_s: float, missing: tuple[int, ...] = ()) -> None:
        who = f"rank {', '.join(map(str, missing))} did not arrive" if missing else "a rank did not arrive"
        super().__init__(f"{operation}: {who} within {waited_s:g} s")
        self.operation = operation
        self.waited_s = waited_s
        self.missing = missing


class PeerLost(MeshError):
    """A rank's process ended, or its connection broke."""

    def __init__(self, operation: str, cause: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(f"{operation}: {cause}")
        self.operation = operation
        self.missing = missing


class MeshAborted(MeshError):
    """This rank was told to leave its mesh."""
