"""One request's tokens as text: whole characters, no end-of-sequence token, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardray.runtime.engine.request import FieldError, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.model.detokenizer import Detokenizer, StopStrings
from shardray.runtime.model.tokenizer import Tokenizer

_PROMPT_TAIL_LEN = 8  # prompt tokens that decide on a leading space, or begin a character that the output completes


class Delta(NamedTuple):
    """What one token, or the end, adds to a stream."""

    text: str = ""
    token_ids: tuple[int, ...] = ()  # every id that was generated, the one that stopped the model included
    finish_reason: FinishReason | None = None
    stopped: bool = False  # a stop string ended the text: the engine does not know, so the request must be cancelled


class OutputText:
    """Turns the ``TokenOutput`` of one request, in order, into deltas.

    Without a tokenizer there are token ids only; FieldError if ``params`` then asks for stop strings. As with stop ids,
    no stop string ends a request before ``min_tokens``.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        if tokenizer is None and params.stop:
            raise FieldError("stop", "the model folder has no tokenizer to match text with; use stop_token_ids")
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            before = prompt_ids[-_PROMPT_TAIL_LEN:] if tokenizer.continues_prompts else ()
            self._detokenizer = Detokenizer(tokenizer, before)
        self._stops = StopStrings(params.stop)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the delta with a finish reason has been given."""
        return self._ended

    def push(self, output: TokenOutput) -> Delta:
        """What ``output`` adds. Nothing once the stream has ended: tokens may still come after a stop string."""
        if self._ended:
            return Delta()
        token_ids = () if output.token_id is None else (output.token_id,)
        self._num_tokens += len(token_ids)
        # The id that stopped the model is a token of the output but not of its text.
        text, stopped = self._add("" if output.finish_reason is FinishReason.STOP else self._decode(token_ids))
        reason = output.finish_reason
        if reason is not None and not stopped:
            rest, stopped = self._add(self._detokenizer.finish() if self._detokenizer else "")
            text += rest + self._stops.finish()
        if stopped:
            reason = FinishReason.STOP
        self._ended = reason is not None
        return Delta(text, token_ids, reason, stopped)

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        return self._detokenizer.push(token_ids) if self._detokenizer else ""

    def _add(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string has ended it."""
        if self._num_tokens < self._min_tokens:
            return text, False
        return self._stops.push(text)
