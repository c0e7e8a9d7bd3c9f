"""Kernels for CUDA, run on CPU tensors by Triton's interpreter: only in a process that was started for it.

    TRITON_INTERPRET=1 .venv/bin/pytest tests/interpreted

tests/model/test_triton_kernels.py does that.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreted.mend import mend

    mend()
else:
    collect_ignore_glob = ["test_*.py"]
