"""What a host does before it has a place may not slow down what it does in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import save_llama

_COUNT = """
import os, sys, torch
from shardray.runtime.engine.shard import warm_up
from shardray.runtime.model.kernels import choose_ops
choose_ops(torch.device("cpu"), torch.bfloat16, 2)  # numba imports scipy where it is, whose BLAS has threads of its own
before = len(os.listdir("/proc/self/task"))
warm_up(sys.argv[1], "bfloat16", "cpu", 2)
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_warming_up_leaves_no_team_of_threads_behind(tmp_path: Path) -> None:
    """A second OpenMP team beside that of the thread which runs the steps, and both sleep between operations."""
    folder = save_llama(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", _COUNT, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split()[-1] == "0", ran.stdout
