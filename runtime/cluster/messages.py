"""What driver and leader tell each other, as MessagePack frames over one connection.

driver → leader    Submit | Cancel | ForgetPrefixes, ...
leader → driver    ServedModel, then Events, ...
"""

from __future__ import annotations

import msgspec

from shardray.runtime.engine.request import EngineRequest, EngineStats, TokenOutput

DRIVER_RANK = 0  # what a driver calls itself in its hello; there is one at a time, or for a moment two


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a request, or go on with one that another mesh began. Its id is unique among all that drivers ever sent."""

    request: EngineRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request; one that is not live is ignored."""

    request_id: str


class ForgetPrefixes(msgspec.Struct, frozen=True, tag=True):
    """Requests to come share nothing with those before."""


Command = Submit | Cancel | ForgetPrefixes


class Rejection(msgspec.Struct, frozen=True):
    """A request that the engine can never run."""

    request_id: str
    field: str
    message: str


class Events(msgspec.Struct, omit_defaults=True):
    """What came since the last message, for all requests of one driver."""

    outputs: list[TokenOutput] = []
    rejections: list[Rejection] = []
    stats: EngineStats | None = None  # at most every half second while the engine works, and when it falls idle
    end: str | None = None  # why nothing more will come

    def merge(self, later: Events) -> None:
        """Add what came after it."""
        self.outputs += later.outputs
        self.rejections += later.rejections
        self.stats = later.stats or self.stats
        self.end = later.end or self.end
