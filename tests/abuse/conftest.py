"""One fleet for all that is done to it: it has to outlive everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.abuse.fleet import AbusedFleet


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AbusedFleet]:
    served = AbusedFleet(tmp_path_factory.mktemp("abused"))
    try:
        yield served
    finally:
        wrong = served.stop()
        assert [*wrong, *served.complaints()] == [], "\n".join(served.stderr[-60:])
