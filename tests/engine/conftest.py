"""Rank processes that the tests of one session share, as long as none failed within a mesh of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def pools() -> Iterator[list[RankPool]]:
    """The last one is in use."""
    made = [RankPool()]
    yield made
    made[-1].close()


@pytest.fixture
def pool(pools: list[RankPool]) -> RankPool:
    if not pools[-1].is_sound:
        pools[-1].close()
        pools.append(RankPool())
    return pools[-1]
