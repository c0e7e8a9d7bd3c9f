"""What a client is sent: the text and tokens that came since it last read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from shardray.runtime.engine.request import FinishReason

# With the most logprobs, a quarter of a megabyte: clients of gRPC refuse messages above 4 MiB.
_MAX_PART_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that a request used."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_prompt_tokens: int = 0  # of the prompt's, those that were computed for other requests


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where a request's time went, from its acceptance by the driver."""

    queue_s: float  # until a replica had a place for it
    time_to_first_token_s: float | None  # None: there was no token
    total_s: float


@dataclasses.dataclass(frozen=True)
class PositionLogprobs:
    """Log-probabilities of one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclasses.dataclass(slots=True)
class Delta:
    """New text and tokens. ``text`` may lag behind ``token_ids``. Only the last delta has a finish_reason."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[PositionLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    embedding: bytes | None = None  # with the end of a request for one

    def parts(self) -> Iterator[Delta]:
        """The same in pieces that any client can take at once: what merged while one did not read may be megabytes.

        Text may lag behind tokens, so all of it comes with the last piece, as does the end.
        """
        while len(self.token_ids) > _MAX_PART_TOKENS:
            yield Delta(token_ids=self.token_ids[:_MAX_PART_TOKENS], logprobs=self.logprobs[:_MAX_PART_TOKENS])
            del self.token_ids[:_MAX_PART_TOKENS], self.logprobs[:_MAX_PART_TOKENS]
        yield self
