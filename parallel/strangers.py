"""Refused connections in the log: who, why, and how often, without letting a stranger fill the disk."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

_INTERVAL_S = 60.0
_MAX_KNOWN = 256
_log = logging.getLogger(__name__)


@dataclass
class _Told:
    at: float
    num_since: int = 0


class Strangers:
    """One line a minute for each address and reason; the line then says how many there were since the last."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told: dict[tuple[str, str], _Told] = {}
        self._lock = threading.Lock()

    def refuse(self, address: str, why: str, detail: str = "") -> None:
        """Tell of one that was refused. ``address``: host:port; ``detail`` may differ from one to the next."""
        now, key = time.monotonic(), (address.rpartition(":")[0], why)
        with self._lock:
            told = self._told.pop(key, None) or _Told(now - _INTERVAL_S)
            self._told[key] = told  # behind all others
            if now - told.at < _INTERVAL_S:
                told.num_since += 1
                return
            more = f"; {told.num_since} more from there since the last such line" if told.num_since else ""
            told.at, told.num_since = now, 0
            if len(self._told) > _MAX_KNOWN:
                self._tell_rest(next(iter(self._told)))
        _log.warning("refused a %s connection from %s: %s%s%s", self._what, address, why, detail, more)

    def close(self) -> None:
        """Tell how many were not told of."""
        with self._lock:
            for key in list(self._told):
                self._tell_rest(key)

    def _tell_rest(self, key: tuple[str, str]) -> None:
        told = self._told.pop(key)
        if told.num_since:
            _log.warning("refused %d more %s connections from %s: %s", told.num_since, self._what, *key)
