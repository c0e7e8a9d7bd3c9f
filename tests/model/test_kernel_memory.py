"""Compiled kernels work on raw addresses, which do not keep an array alive: what they read must not have been freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
TESTS = [
    *(FOLDER / f"test_{name}.py" for name in ("kernels", "prefill_kernel")),
    *sorted((FOLDER.parent / "parallel").glob("test_*kernel*.py")),
]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_no_kernel_reads_memory_that_was_given_back(path: Path) -> None:
    # glibc then overwrites what is freed, which otherwise only other threads do, now and then.
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
