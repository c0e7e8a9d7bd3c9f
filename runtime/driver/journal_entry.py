"""One request as the journal keeps it, in memory and as bytes.

Times are of this process's monotonic clock in memory, and of the calendar's in bytes: those outlive a machine.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec

from shardray.runtime.driver.ends import RequestEnd
from shardray.runtime.engine.request import EngineRequest, SamplingParams, TokenOutput
from shardray.runtime.model.spec import Pooling

_TIMES = ("accepted_s", "dispatched_s", "first_token_s", "ended_s")


@dataclasses.dataclass
class JournalEntry:
    """One request. ``params`` has a seed, so that the continuation is the same text on any mesh."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    timeout_s: float = 600.0  # from its acceptance
    resumable_s: float = 0.0  # how long it is kept for a client that lost its connection; 0: not at all
    sent_ids: list[int] = dataclasses.field(default_factory=list)
    sent_logprobs: list[bytes] = dataclasses.field(default_factory=list)  # of resumable requests that ask for them
    accepted_s: float = dataclasses.field(default_factory=time.monotonic)
    dispatched_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    end: RequestEnd | None = None
    pooling: Pooling | None = None  # for an embedding instead of tokens

    @property
    def deadline_s(self) -> float:
        return self.accepted_s + self.timeout_s

    def append(self, token: TokenOutput) -> None:
        """Add a token that is about to be sent."""
        assert token.token_id is not None
        self.sent_ids.append(token.token_id)
        if self.resumable_s and self.params.logprobs is not None and token.logprob is not None:
            self.sent_logprobs.append(_encoder.encode((token.logprob, token.top_logprobs[: self.params.logprobs])))

    def outputs(self) -> list[TokenOutput]:
        """What the engine yielded for it so far, its end included."""
        logprobs = [_logprob_decoder.decode(data) for data in self.sent_logprobs] or [(None, ())] * len(self.sent_ids)
        outputs = [
            TokenOutput(self.request_id, token_id, logprob, top)
            for token_id, (logprob, top) in zip(self.sent_ids, logprobs, strict=True)
        ]
        if self.end is not None and self.end.reason is not None:
            last = outputs.pop() if self.end.with_token else TokenOutput(self.request_id)
            outputs.append(msgspec.structs.replace(last, finish_reason=self.end.reason))
        return outputs

    def as_engine_request(self, dispatch_id: str, is_traced: bool = False, prefix_scope: str = "") -> EngineRequest:
        """What a replica is handed, now or after another one was lost."""
        return EngineRequest(
            request_id=dispatch_id,
            prompt_ids=self.prompt_ids,
            generated_ids=tuple(self.sent_ids),
            params=self.params,
            priority=self.priority,
            pooling=self.pooling,
            is_traced=is_traced,
            prefix_scope=prefix_scope,
        )

    def to_bytes(self) -> bytes:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _encoder.encode(_Stored(**_shift_times(fields, time.time() - time.monotonic())))

    @classmethod
    def from_bytes(cls, data: bytes) -> JournalEntry:
        """Raises msgspec.DecodeError for anything that ``to_bytes`` did not write."""
        fields = msgspec.structs.asdict(_entry_decoder.decode(data))
        return cls(**_shift_times(fields, time.monotonic() - time.time()))


class _Stored(msgspec.Struct, array_like=True):
    """The fields of JournalEntry, in an order that is part of the schema of a journal on disk."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int
    timeout_s: float
    resumable_s: float
    sent_ids: list[int]
    sent_logprobs: list[bytes]
    accepted_s: float
    dispatched_s: float | None
    first_token_s: float | None
    ended_s: float | None
    end: RequestEnd | None
    pooling: Pooling | None = None


_Logprob = tuple[float | None, tuple[tuple[int, float], ...]]
_encoder = msgspec.msgpack.Encoder()
_entry_decoder = msgspec.msgpack.Decoder(_Stored)
_logprob_decoder = msgspec.msgpack.Decoder(_Logprob)


def _shift_times(fields: dict[str, Any], offset_s: float) -> dict[str, Any]:
    shifted = {name: fields[name] + offset_s for name in _TIMES if fields[name] is not None}
    return fields | shifted
