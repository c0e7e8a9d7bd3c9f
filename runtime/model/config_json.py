"""The fields of a ``config.json``, and which of them were looked at."""

from __future__ import annotations

import difflib
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class Config(Mapping[str, Any]):
    """``{...} | config`` has defaults for fields that are absent, ``config | {...}`` has fields replaced."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.read: set[str] = set()  # of the fields themselves, not of what was put before or behind them

    def __getitem__(self, field: str) -> Any:
        self.read.add(field)
        return self._fields[field]

    def has_value(self, field: str) -> bool:
        """Whether a field is there and not null; does not count as reading it."""
        return self._fields.get(field) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __or__(self, replaced: Mapping[str, Any]) -> Config:
        return _Joined(self, {}, replaced)

    def __ror__(self, defaults: Mapping[str, Any]) -> Config:
        return _Joined(self, defaults, {})


class _Joined(Config):
    """Reads through to the config that it stands for."""

    def __init__(self, config: Config, defaults: Mapping[str, Any], replaced: Mapping[str, Any]) -> None:
        self._fields = ChainMap(dict(replaced), config, dict(defaults))  # type: ignore[arg-type]
        self.read = config.read

    def __getitem__(self, field: str) -> Any:
        return self._fields[field]


def nearest_of(value: object, accepted: Iterable[str]) -> str:
    """What to try instead of ``value``."""
    nearest = difflib.get_close_matches(str(value), accepted, n=1, cutoff=0.0)[0]
    return f"the nearest is {nearest!r} (supported: {', '.join(sorted(accepted))})"
