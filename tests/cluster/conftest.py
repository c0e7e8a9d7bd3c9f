"""Fixtures of the cluster tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardray.runtime.cluster.ray_session import RaySession
from shardray.runtime.config import RaySettings
from tests.cluster.fleets import make_tiny_llama


@pytest.fixture(scope="package")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="package")
def local_ray() -> Iterator[RaySession]:
    """One Ray for the tests of this folder; sessions that they open join it."""
    session = RaySession(RaySettings(), num_hosts=4)
    yield session
    session.stop()
