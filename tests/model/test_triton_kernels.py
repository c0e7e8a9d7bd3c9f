"""Runs tests/kernels in Triton's interpreter, each file in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One thread: the arrays of a program are tiny.
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
FILES = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.__version__.startswith("3.6."):
    pytest.skip("tests/kernels/mend.py mends the interpreter of Triton 3.6", allow_module_level=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_for_cuda_do_what_the_reference_does(path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)],
        cwd=ROOT, env=environment | INTERPRETED, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
