"""Files with secrets: refused when other users may read them, read again when they change."""

from __future__ import annotations

import abc
import asyncio
import logging
import os
import stat
from collections.abc import Sequence

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0


class SecretsError(ValueError):
    """A file that cannot be used; the message is one line with the key of the settings, the path and the fix."""


class SecretFiles(abc.ABC):
    """Something that is made of files, and made anew when one of them is replaced."""

    def __init__(self, *paths: str) -> None:
        self._paths = paths
        self._seen: list[tuple[int, ...] | None] = []

    @abc.abstractmethod
    def load(self) -> None:
        """Read the files and take them into use, all or none. Raises SecretsError."""

    def start(self) -> None:
        """Raises SecretsError."""
        self._look()
        self.load()

    def refresh(self) -> None:
        """Read the files again if one has changed; what cannot be used is told to the log, and changes nothing."""
        if not self._look():
            return
        try:
            self.load()
        except SecretsError as error:
            _log.error("%s; what was read before stays in use", error)
        else:
            _log.warning("read again: %s", ", ".join(self._paths))

    def _look(self) -> bool:
        """Whether a file is another one than at the last look. Comes before reading: what changes then is seen next."""
        before, self._seen = self._seen, [_identity(path) for path in self._paths]
        return self._seen != before


async def keep_fresh(files: Sequence[SecretFiles]) -> None:
    """Never ends."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        for one in files:
            one.refresh()


def read_file(key: str, path: str, is_secret: bool = False) -> bytes:
    """``key`` names the setting. Raises SecretsError."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if is_secret and mode & (stat.S_IROTH | stat.S_IWOTH):
                fix = f"chmod o-rw {path}; a secret in Kubernetes: defaultMode: 0440"
                raise SecretsError(f"{key}: {path} holds secrets and is open to every user of this machine; {fix}")
            return file.read()
    except OSError as error:
        raise SecretsError(f"{key}: {path} cannot be read: {error.strerror}") from None


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode
