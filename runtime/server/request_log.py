"""What the log is told of requests: their ids and sizes. Prompts and outputs only if the operator asks for them."""

from __future__ import annotations

import logging

from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.model.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_words = logging.getLogger("shardray.prompts")


class RequestLog:
    """Looked at when a call begins and ends, never for a message."""

    def __init__(self, tokenizer: Tokenizer | None, log_prompts: bool) -> None:
        self._tokenizer = tokenizer
        self._log_prompts = log_prompts
        if log_prompts:
            _words.setLevel(logging.INFO)  # whatever the level of the others is

    def accepted(self, entry: JournalEntry) -> None:
        _log.info("request %s: %d prompt tokens", entry.request_id, len(entry.prompt_ids))
        if self._log_prompts:
            _words.info("request %s: prompt %s", entry.request_id, self._shown(entry.prompt_ids))

    def left(self, entry: JournalEntry) -> None:
        """Its call is over; a resumable request may go on."""
        _log.info("request %s: its call is over, %d tokens were made", entry.request_id, len(entry.sent_ids))
        if self._log_prompts:
            _words.info("request %s: output %s", entry.request_id, self._shown(entry.sent_ids))

    def _shown(self, token_ids: list[int] | tuple[int, ...]) -> str:
        """On one line."""
        return repr(list(token_ids) if self._tokenizer is None else self._tokenizer.decode(list(token_ids)))
