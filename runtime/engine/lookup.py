"""Drafts what comes next in a sequence: what came where the same tokens stood before (prompt lookup).

The method is that of Saxena's prompt lookup decoding (2023). Text repeats its prompt where it quotes, edits or
summarizes it, and itself in tables and code. The longer it has done so, the more is drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

_NUM_SAME = 2  # tokens by which a place is found


class PromptLookup:
    """Reads a sequence as it grows; never changes it. Each token costs it the same, however long the sequence is."""

    __slots__ = ("_behind", "_expected", "_num_read", "_num_right", "_token_ids")

    def __init__(self, token_ids: Sequence[int]) -> None:
        """``token_ids``: those that are known, to which others are added later."""
        self._token_ids = token_ids
        self._behind: dict[tuple[int, ...], int] = {}  # tokens -> the index behind the last place where they stand
        self._num_read = 0
        self._expected: int | None = None  # where the token stands that should come next
        self._num_right = 0  # tokens in a row that came as expected

    def is_sure(self, fewest_right: int) -> bool:
        """Whether something is expected behind the tokens that it has read, and as many have come as expected."""
        return self._expected is not None and self._num_right >= fewest_right

    def read(self) -> None:
        """Take in the tokens that have come."""
        token_ids = self._token_ids
        for index in range(self._num_read, len(token_ids)):
            if self._expected is not None and token_ids[self._expected] == token_ids[index]:
                self._expected += 1
                self._num_right += 1
            else:
                self._expected = None
                self._num_right = 0
            last = tuple(token_ids[max(0, index + 1 - _NUM_SAME) : index + 1])
            place = self._behind.get(last)
            self._behind[last] = index + 1
            if self._expected is None:
                self._expected = place
        self._num_read = len(token_ids)

    def draft(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens that should come next; not many more than have come as expected.

        They are 1, 3, 7, ...: with the token before them, rows of few different lengths.
        """
        num_tokens = min(most, self._num_right + 1)
        if self._expected is None or num_tokens < 1:
            return ()
        num_tokens = (1 << ((num_tokens + 1).bit_length() - 1)) - 1
        known, drafted = self._token_ids, list[int]()
        for index in range(self._expected, self._expected + num_tokens):
            drafted.append(known[index] if index < len(known) else drafted[index - len(known)])
        return tuple(drafted)
