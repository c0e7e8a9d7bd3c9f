"""The pages of the KV cache as plain integers: which are free, and how many holders each of the others has.

Knows nothing of sequences, tensors or devices. Pages are ref-counted: sequences that begin alike hold the same ones. A
page that nobody holds any more is kept for such a sequence while there is another to hand out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from shardray.runtime.engine.prefixes import Prefix, PrefixIndex


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """``num_pages`` pages that hold the keys and values of ``block_size`` tokens each."""

    __slots__ = ("_free", "_kept", "_prefixes", "_ref_counts", "block_size", "num_pages")

    def __init__(self, num_pages: int, block_size: int) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self._ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the warmest in the caches
        self._kept: dict[int, None] = {}  # pages without a holder that hold a known prefix, the one to go first first
        self._prefixes = PrefixIndex(block_size)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def count_free(self, pages: Iterable[int]) -> int:
        """How many of them nobody holds."""
        return sum(self._ref_counts[page] == 0 for page in pages)

    def find(self, scope: str, token_ids: Sequence[int], most: int) -> tuple[Prefix, list[int]]:
        """The longest prefix of ``token_ids`` that pages hold, of at most ``most`` blocks, and these pages."""
        return self._prefixes.find(scope, token_ids, most)

    def add_prefix(self, prefix: Prefix, token_ids: Sequence[int], pages: Sequence[int], num_blocks: int) -> Prefix:
        """See ``PrefixIndex.add``; what the pages hold may not change from now on."""
        return self._prefixes.add(prefix, token_ids, pages, num_blocks)

    def forget_prefixes(self) -> None:
        """No page is found any more by what it holds."""
        self._prefixes.clear()
        self._free += self._kept
        self._kept.clear()

    def allocate(self, num_pages: int) -> list[int]:
        """Take free pages, with one holder each. Raises OutOfPagesError, and takes none, when too few are free."""
        if num_pages > self.num_free:
            raise OutOfPagesError(f"{num_pages} pages asked for, {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() if self._free else self._give_up_kept() for _ in range(num_pages)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """Add a holder to a page that is in use, or that holds a known prefix."""
        if page in self._kept:
            del self._kept[page]
        else:
            self._require_used(page)
        self._ref_counts[page] += 1

    def release(self, page: int) -> None:
        """Drop one holder; with the last one gone the page is free."""
        self._require_used(page)
        self._ref_counts[page] -= 1
        if self._ref_counts[page] == 0:
            if page in self._prefixes:
                self._kept[page] = None
            else:
                self._free.append(page)

    def check_integrity(self, held: Iterable[int] = ()) -> None:
        """Raise RuntimeError unless free + used == total and every page is in ``held`` as often as it is counted."""
        num_used = self.num_pages - self._ref_counts.count(0)
        free = {*self._free, *self._kept}
        if len(free) != self.num_free or len(free) + num_used != self.num_pages:
            raise RuntimeError(f"pages: {len(free)} free + {num_used} used != {self.num_pages} in all")
        self._prefixes.check_integrity(set(range(self.num_pages)).difference(self._free))
        holders = Counter(held)
        for page, ref_count in enumerate(self._ref_counts):
            if holders[page] != ref_count:
                raise RuntimeError(f"page {page} has {holders[page]} holders but is counted as having {ref_count}")

    def _give_up_kept(self) -> int:
        """Of the pages kept, the one that was held last the longest ago, and of a sequence's those at its end first."""
        page = next(iter(self._kept))
        del self._kept[page]
        self._prefixes.forget(page)
        return page

    def _require_used(self, page: int) -> None:
        if self._ref_counts[page] == 0:
            raise ValueError(f"page {page} is free: it can be neither retained nor released")
