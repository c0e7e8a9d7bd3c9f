"""A growing sequence of token ids as a growing text, and the stop strings that may end it.

Both cost O(1) per token however long the text is, and what they yield does not depend on how tokens are grouped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from shardray.runtime.model.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text as they come. A character is yielded once its last byte is there.

    ``prompt_tail_ids`` are the ids just before the first one pushed (any number; the last few are enough): the text
    goes on from them, so a SentencePiece leading space is kept, and a character begun there is completed. Without
    them, what ``push`` and ``finish`` return adds up to ``tokenizer.decode`` of all ids pushed. Special tokens have no
    text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds the bytes of half a character
        self._has_begun = False
        self.push(prompt_tail_ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete; empty while a character is still in pieces."""
        return self._utf8.decode(b"".join(map(self._bytes_of, ids)))

    def finish(self) -> str:
        """What is left: a replacement character for each character that was never completed."""
        return self._utf8.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._tokenizer.special_token_ids:
            return b""
        piece = self._tokenizer.piece(token_id)
        if self._has_begun or not piece:
            return piece
        self._has_begun = True
        return self._tokenizer.first_piece(token_id)


class StopStrings:
    """Ends a text before the stop string that is completed first.

    Text that could still become a stop string is held back, so none of one is ever sent.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to send, whether the text has ended). After the end nothing more is yielded."""
        if not self._stops:
            return text, False
        if self._matched:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start = min(found)
            self._held, self._matched = "", True
            return text[:start], True
        safe_len = len(text) - self._held_len(text)
        self._held = text[safe_len:]
        return text[:safe_len], False

    def finish(self) -> str:
        """The text held back, when the stream ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _held_len(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for tail_len in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-tail_len:]) for stop in self._stops):
                return tail_len
        return 0
