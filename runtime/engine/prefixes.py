"""Which page holds the keys and values of which tokens behind which others: how prompts that begin alike are known.

A block is found by its own tokens and the block before it, never by a hash alone: two prompts share a page only if all
their tokens up to its end are the same. Requests of different scopes share none.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import count
from typing import NamedTuple


class Prefix(NamedTuple):
    """The first blocks of a sequence, as far as the index knows them."""

    node: int  # of the last of them, or the root of its scope
    num_blocks: int


UNKNOWN = Prefix(0, 0)  # of a sequence that has not started


class PrefixIndex:
    """Full blocks of ``block_size`` tokens as trees: each is a child of the block before it, and has one page."""

    __slots__ = ("_block_size", "_children", "_keys", "_nodes", "_roots")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._children: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (node, tokens) -> (child, its page)
        self._roots: dict[str, int] = {}  # by scope
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> where it stands in the tree
        self._nodes = count(1)  # never used again, so that what stood below a block that is forgotten is not found

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    def find(self, scope: str, token_ids: Sequence[int], most: int) -> tuple[Prefix, list[int]]:
        """The longest prefix of ``token_ids`` that is known, of at most ``most`` blocks, and its pages."""
        if scope not in self._roots:
            self._roots[scope] = next(self._nodes)
        prefix, pages = Prefix(self._roots[scope], 0), list[int]()
        while prefix.num_blocks < most and (child := self._children.get(self._key(prefix, token_ids))) is not None:
            prefix = Prefix(child[0], prefix.num_blocks + 1)
            pages.append(child[1])
        return prefix, pages

    def add(self, prefix: Prefix, token_ids: Sequence[int], pages: Sequence[int], num_blocks: int) -> Prefix:
        """Make the blocks of a sequence after ``prefix`` known, so that it has ``num_blocks``; returns that prefix.

        ``token_ids`` and ``pages`` are the whole sequence's. Where another page holds the same, it stays the known one.
        """
        while prefix.num_blocks < num_blocks:
            key, page = self._key(prefix, token_ids), pages[prefix.num_blocks]
            child = self._children.get(key)
            if child is None:
                child = self._children[key] = next(self._nodes), page
                self._keys[page] = key
            prefix = Prefix(child[0], prefix.num_blocks + 1)
        return prefix

    def forget(self, page: int) -> None:
        """What this page holds is about to be overwritten."""
        del self._children[self._keys.pop(page)]

    def clear(self) -> None:
        """Forget all pages, and those that are to be added behind what is known now."""
        self._roots.clear()
        self._children.clear()
        self._keys.clear()

    def check_integrity(self, pages: Container[int]) -> None:
        """Raise RuntimeError unless page and place in the tree name each other, and all pages are among ``pages``."""
        for page, key in self._keys.items():
            if page not in pages:
                raise RuntimeError(f"page {page} is known to hold a prefix, but is free")
            if self._children[key][1] != page:
                raise RuntimeError(f"page {page} stands where page {self._children[key][1]} is known to be")
        if len(self._children) != len(self._keys):
            raise RuntimeError(f"{len(self._children)} blocks are known on {len(self._keys)} pages")

    def _key(self, prefix: Prefix, token_ids: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        start = prefix.num_blocks * self._block_size
        return prefix.node, tuple(token_ids[start : start + self._block_size])
