"""The program runs on uvloop where that is installed, ends as asyncio's own runner would; what it loaded stays."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys

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


_SETTLE = """
import gc
from shardray.runtime.server.loop import settle
kept = [[number] for number in range(100_000)]
settle()
print(gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 1000)
"""


def test_later_searches_for_garbage_leave_out_what_was_there_when_the_process_had_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", _SETTLE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["True"] * 3, "")
