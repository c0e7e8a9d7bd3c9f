"""No fleet outlives the module that started it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.command import Command


@pytest.fixture(scope="module", autouse=True)
def _commands_end_with_their_module() -> Iterator[None]:
    """Also where a test or a fixture failed, so that the next ones have the cores for themselves."""
    yield
    for command in Command.started:
        command.kill()
    Command.started.clear()
