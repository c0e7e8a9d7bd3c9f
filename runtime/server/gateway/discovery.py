"""The file that a gateway watches for its workers: this port is entered in it, beside what others have entered.

JSON of smg's file discovery, version 1. The file is replaced as a whole, so that its readers never see half of it; who
writes holds a lock beside it, so that several fleets may share one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_LOCK_S = 5.0
_FIX = "it has to be a JSON object with version 1 and a list of workers; remove it, or name another file"


class DiscoveryFileError(ValueError):
    """The file cannot be used; one line with the key of the settings and the fix."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"gateway.discovery_file: {path} {what}")


class DiscoveryFile:
    """Blocks for as long as others write. All methods raise DiscoveryFileError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(f"{path}.lock", timeout=_LOCK_S)
        # Of its own for each process: so a gateway sees that another one serves at an address that it knows.
        self._worker_id = f"shardray-{uuid.uuid4().hex[:12]}"

    def enter(self, url: str) -> None:
        """Take the place of whoever was entered with this URL before."""
        self._change(drop={"url": url}, add=[{"id": self._worker_id, "url": url}])

    def leave(self) -> None:
        """The others stay, and a successor at the same address as well. Idempotent."""
        self._change(drop={"id": self._worker_id}, add=[])

    def check(self) -> None:
        """Write it without a change: what stands in the way of that is heard of before it matters."""
        self.leave()

    def _change(self, drop: dict[str, str], add: list[dict[str, str]]) -> None:
        try:
            with self._lock:
                workers = [worker for worker in self._read() if not drop.items() <= worker.items()]
                self._replace({"version": 1, "workers": [*workers, *add]})
        except Timeout:
            what = f"is locked by another process for {_LOCK_S:g} s; end it, or name another file"
            raise DiscoveryFileError(self._path, what) from None
        except OSError as error:
            what = f"cannot be written: {error.strerror}; name a file in a folder of this user"
            raise DiscoveryFileError(self._path, what) from None

    def _read(self) -> list[dict[str, Any]]:
        """What is entered; nothing if there is no file."""
        try:
            manifest = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except ValueError:
            raise DiscoveryFileError(self._path, f"is not JSON; {_FIX}") from None
        workers = manifest.get("workers") if isinstance(manifest, dict) and manifest.get("version") == 1 else None
        if not (isinstance(workers, list) and all(isinstance(worker, dict) for worker in workers)):
            raise DiscoveryFileError(self._path, f"lists no workers; {_FIX}")
        return workers

    def _replace(self, manifest: dict[str, Any]) -> None:
        descriptor, written = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                os.fchmod(descriptor, 0o644)  # a gateway may be another user; it holds addresses, and no secret
            os.replace(written, self._path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(written)
            raise
