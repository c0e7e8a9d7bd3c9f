"""One line of ``shardray doctor``."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from shardray.runtime.config import Config


class Status(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"  # it works, but less well, or not everywhere
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What a check found, and unless all is well, what to do."""

    status: Status
    what: str
    fix: str = ""


Check = Callable[[Config], Finding]


def ok(what: str) -> Finding:
    return Finding(Status.OK, what)


def warn(what: str, fix: str) -> Finding:
    return Finding(Status.WARN, what, fix)


def fail(what: str, fix: str) -> Finding:
    return Finding(Status.FAIL, what, fix)
