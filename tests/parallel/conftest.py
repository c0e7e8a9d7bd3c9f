"""Rank processes that the tests of one session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.rank_processes import RankProcesses


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(5)
    yield processes
    processes.close()
