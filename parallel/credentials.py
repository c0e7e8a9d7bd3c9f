"""What the ranks of one mesh know, and nobody else."""

from __future__ import annotations

from dataclasses import dataclass

from shardray.parallel.tls import TlsFiles


@dataclass(frozen=True)
class Credentials:
    """Shown by whoever connects to a rank; made anew for every mesh, but for the certificates."""

    epoch: str  # names the mesh
    secret: str
    tls: TlsFiles | None = None
