"""Machine code in the cache on disk belongs to the sources that it was made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HELPER = """
import numba

@numba.njit(inline="always")
def answer():
    return {answer}
"""
_KERNEL = """
import numba

from shardray.parallel.kernels import jit
import helper

def tell(args):
    numba.carray(args, (2,))[1] = helper.answer()
"""
_MAIN = """
import array

from shardray.parallel.kernels import jit
import kernel

block = array.array("q", (0, 0))
jit.compile_function(kernel.tell).call(block.buffer_info()[0])
print(block[1])
"""


def test_a_kernel_is_compiled_again_when_a_file_that_it_uses_has_changed(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(_KERNEL)
    (tmp_path / "main.py").write_text(_MAIN)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    for answer in (1, 1, 2):
        (tmp_path / "helper.py").write_text(_HELPER.format(answer=answer))
        done = subprocess.run(
            [sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == str(answer), done.stderr
