"""Who sends requests to the meshes, as a replica sees it."""

from __future__ import annotations

from typing import Protocol

from shardray.runtime.cluster.form import FormedMesh


class Outlet(Protocol):
    """Told when a mesh is up, and when it is down until the next one is."""

    async def up(self, replica_id: int, mesh: FormedMesh) -> None:
        """Use ``mesh`` from now on, also for what its forerunner has not finished. Raises ConnectionError."""

    def down(self, replica_id: int, reason: str, failed: bool) -> None:
        """The mesh is no more; keep its requests until the next one is up. ``failed``: it ended by itself."""
