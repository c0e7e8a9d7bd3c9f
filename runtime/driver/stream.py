"""One client's stream: tokens in, deltas of text out, at the client's own pace.

Tokens are turned into text and matched against stop strings as they arrive, whether or not the client reads. What it
has not read is one pending delta that grows, bounded by the request's own max_tokens. A stream that is made from an
entry with tokens begins with those; a client that comes back has seen the first of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from shardray.runtime.driver.deltas import Delta, PositionLogprobs, Timing, Usage
from shardray.runtime.driver.ends import RequestEnd
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.engine.output import OutputText
from shardray.runtime.engine.request import FinishReason, TokenOutput
from shardray.runtime.model.tokenizer import Tokenizer


class RequestStream:
    """Iterate it once, in the driver's loop; raises the request's error where it failed.

    ``num_seen_tokens`` ids and ``num_seen_chars`` characters, of those that the entry has and then of those to come,
    are left out.
    """

    def __init__(
        self, entry: JournalEntry, tokenizer: Tokenizer | None, num_seen_tokens: int = 0, num_seen_chars: int = 0
    ) -> None:
        self.entry = entry
        self.request_id = entry.request_id
        self.end: RequestEnd | None = None  # once it has ended
        self._num_logprobs = entry.params.logprobs
        self._text = OutputText(tokenizer, entry.params, entry.prompt_ids)
        self._num_output_tokens = 0
        self._num_cached_prompt_tokens = 0
        self._num_tokens_to_skip = num_seen_tokens
        self._num_chars_to_skip = num_seen_chars
        self._pending = Delta()
        self._error: Exception | None = None
        self._news = asyncio.Event()
        for output in entry.outputs():
            self.push(output)
        if entry.end is not None and (error := entry.end.as_error()) is not None:
            self.fail(error)

    @property
    def ended(self) -> bool:
        """Whether nothing more will be added."""
        return self.end is not None

    def mark_dispatched(self) -> None:
        """A replica has a place for the request. Only the first time counts."""
        if self.entry.dispatched_s is None:
            self.entry.dispatched_s = time.monotonic()

    def push(self, output: TokenOutput) -> None:
        """Add one token or the end of the stream; ends it as well if a stop string is complete."""
        if self.end is not None:
            return
        if output.token_id is not None:
            self._count_token(output.token_id, output)
        added = self._text.push(output)
        self._pending.text += self._unseen(added.text) if self._num_chars_to_skip else added.text
        self._pending.embedding = output.embedding
        if added.finish_reason is not None:
            self._end(added.finish_reason)
            self.end = RequestEnd(output.finish_reason, with_token=output.token_id is not None)
        self._news.set()

    def finish(self, reason: FinishReason) -> None:
        """End the stream after the text that was held back."""
        self.push(TokenOutput(self.request_id, finish_reason=reason))

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is pending."""
        if not self.ended:
            self._error = error
            self.end = RequestEnd.from_error(error)
            self._news.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            await self._news.wait()
            self._news.clear()
            delta, self._pending = self._pending, Delta()
            if delta.token_ids or delta.text or delta.finish_reason is not None:
                for part in delta.parts():
                    yield part
            elif self._error is not None:
                raise self._error
            if delta.finish_reason is not None:
                return
            if self._error is not None:
                self._news.set()  # more may have come while the last delta was on its way

    def _unseen(self, text: str) -> str:
        """What is left of it behind the characters that the client has seen."""
        num_hidden_chars = min(self._num_chars_to_skip, len(text))
        self._num_chars_to_skip -= num_hidden_chars
        return text[num_hidden_chars:]

    def _count_token(self, token_id: int, output: TokenOutput) -> None:
        if self.entry.first_token_s is None:
            self.entry.first_token_s = time.monotonic()
        self._num_output_tokens += 1
        self._num_cached_prompt_tokens += output.num_cached_prompt_tokens
        if self._num_tokens_to_skip > 0:
            self._num_tokens_to_skip -= 1
            return
        self._pending.token_ids.append(token_id)
        if self._num_logprobs is not None and output.logprob is not None:
            top = output.top_logprobs[: self._num_logprobs]
            self._pending.logprobs.append(PositionLogprobs(token_id, output.logprob, top))

    def _end(self, reason: FinishReason) -> None:
        entry = self.entry
        if entry.ended_s is None:
            entry.ended_s = time.monotonic()
        first_s = entry.first_token_s
        self._pending.finish_reason = reason
        self._pending.usage = Usage(len(entry.prompt_ids), self._num_output_tokens, self._num_cached_prompt_tokens)
        self._pending.timing = Timing(
            queue_s=(entry.dispatched_s or entry.ended_s) - entry.accepted_s,
            time_to_first_token_s=None if first_s is None else first_s - entry.accepted_s,
            total_s=entry.ended_s - entry.accepted_s,
        )
