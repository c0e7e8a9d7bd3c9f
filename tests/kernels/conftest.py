"""The kernels for CUDA: on a device (marked ``gpu``), or on CPU tensors in Triton's interpreter.

    make test-gpu
    TRITON_INTERPRET=1 .venv/bin/pytest tests/kernels

Which of them is settled when Triton is imported, so the second needs a process of its own:
tests/model/test_triton_kernels.py starts one for each file here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.kernels.mend import mend

    mend()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(tryfirst=True)  # before those with other marks are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
