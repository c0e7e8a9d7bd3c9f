"""Prompts and outputs in the log, for those who ask for them by ``grpc.log_prompts``; nobody else's log has them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.model.tokenizer import Tokenizer

_words = logging.getLogger("shardray.prompts")


class PromptLog:
    """Looked at when a call begins and ends, never for a message."""

    def __init__(self, tokenizer: Tokenizer | None, is_on: bool) -> None:
        self._tokenizer = tokenizer
        self._is_on = is_on
        if is_on:
            _words.setLevel(logging.INFO)  # whatever the level of the others is

    def accepted(self, entry: JournalEntry) -> None:
        if self._is_on:
            _words.info("request %s: prompt %s", entry.request_id, self._shown(entry.prompt_ids))

    def left(self, entry: JournalEntry) -> None:
        """Its call is over; a resumable request may go on."""
        if self._is_on:
            _words.info("request %s: output %s", entry.request_id, self._shown(entry.sent_ids))

    def _shown(self, token_ids: Sequence[int]) -> str:
        """On one line."""
        return repr(list(token_ids) if self._tokenizer is None else self._tokenizer.decode(token_ids))
