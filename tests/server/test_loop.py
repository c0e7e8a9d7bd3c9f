"""The program runs on uvloop where that is installed, and ends as asyncio's own runner would."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest

from shardray.runtime.server.loop import run


def test_the_result_and_the_error_of_the_program_come_through() -> None:
    async def fail() -> None:
        raise KeyError("x")

    assert run(asyncio.sleep(0, result=3)) == 3
    with pytest.raises(KeyError):
        run(fail())


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")
def test_uvloop_is_used_where_it_is_installed() -> None:
    async def loop_module() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(loop_module()).startswith("uvloop")
