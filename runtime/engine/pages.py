"""The pages of the KV cache as plain integers: which are free, and how many holders each of the others has.

Knows nothing of sequences, tensors or devices. Pages are ref-counted so that sequences may come to share a prefix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """``num_pages`` pages that hold the keys and values of ``block_size`` tokens each."""

    __slots__ = ("_free", "_ref_counts", "block_size", "num_pages")

    def __init__(self, num_pages: int, block_size: int) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self._ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the warmest in the caches

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Take free pages, with one holder each. Raises OutOfPagesError, and takes none, when too few are free."""
        if num_pages > len(self._free):
            raise OutOfPagesError(f"{num_pages} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """Add a holder to a page in use."""
        self._require_used(page)
        self._ref_counts[page] += 1

    def release(self, page: int) -> None:
        """Drop one holder; with the last one gone the page is free."""
        self._require_used(page)
        self._ref_counts[page] -= 1
        if self._ref_counts[page] == 0:
            self._free.append(page)

    def check_integrity(self, held: Iterable[int] = ()) -> None:
        """Raise RuntimeError unless free + used == total and every page is in ``held`` as often as it is counted."""
        num_used = self.num_pages - self._ref_counts.count(0)
        num_free = len(set(self._free))
        if num_free != len(self._free) or num_free + num_used != self.num_pages:
            raise RuntimeError(f"pages: {num_free} free + {num_used} used != {self.num_pages} in all")
        holders = Counter(held)
        for page, ref_count in enumerate(self._ref_counts):
            if holders[page] != ref_count:
                raise RuntimeError(f"page {page} has {holders[page]} holders but is counted as having {ref_count}")

    def _require_used(self, page: int) -> None:
        if self._ref_counts[page] == 0:
            raise ValueError(f"page {page} is free: it can be neither retained nor released")
